"""`python -m moekern info [--json]`, `selftest`, `export`, `warmup`, `tune` and `emulate`.

`info` has to work where the package does not: nothing here or in info.py imports more than the
standard library before it is needed.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from moekern import info

_MODULES = {  # with add_arguments(parser) and run(options), imported by who asks for them
    "warmup": ("moekern.warmup", "compile a model's GPU kernels before they are asked for"),
    "tune": ("moekern.tune", "measure the tiles of a model's products on a GPU, and keep them"),
    "emulate": (
        "moekern.backends.cuda.emulator.command",
        "run a kernel's PTX for sm_90a on the CPU and say what is wrong with it",
    ),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="moekern", description="FP8 GEMM and MoE kernels for the device you have.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("info", help="what is installed, what can run, and why the rest cannot")
    show.add_argument("--json", action="store_true", help="for machines")
    commands.add_parser("selftest", help="run every kernel that can run here on a small problem and check its bits")
    commands.add_parser("export", help="write an FP8 checkpoint of transformers' as ONNX", add_help=False)
    for name, (_, help) in _MODULES.items():
        commands.add_parser(name, help=help, add_help=False)
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in ("export", *_MODULES):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "info":
        report = info.collect()
        print(info.as_json(report) if options.json else info.as_text(report))
        return 0
    broken = info.import_error()
    if broken is not None:
        print(f"moekern cannot be imported: {broken}\n`python -m moekern info` tells more.", file=sys.stderr)
        return 1
    if options.command == "export":
        return _export(rest)
    if options.command in _MODULES:
        return _run(options.command, rest)
    from moekern.testing import selftest

    return selftest.main()


def _export(arguments: list[str]) -> int:
    from moekern.onnx import checkpoint
    from moekern.op import NotSupported

    parser = argparse.ArgumentParser(prog="moekern export", description="Write an FP8 checkpoint as ONNX.")
    checkpoint.add_arguments(parser)
    try:
        print(checkpoint.run(parser.parse_args(arguments)))
    except (ImportError, NotSupported, OSError, RuntimeError, ValueError) as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


def _run(name: str, arguments: list[str]) -> int:
    module = importlib.import_module(_MODULES[name][0])
    parser = argparse.ArgumentParser(prog=f"moekern {name}", description=module.__doc__)
    module.add_arguments(parser)
    return module.run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
