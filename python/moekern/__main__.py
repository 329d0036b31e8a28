"""`python -m moekern info [--json]` and `python -m moekern selftest`.

`info` has to work where the package does not: nothing here or in info.py imports more than the
standard library before it is needed.
"""

from __future__ import annotations

import argparse
import sys

from moekern import info


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="moekern", description="FP8 GEMM and MoE kernels for the device you have.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("info", help="what is installed, what can run, and why the rest cannot")
    show.add_argument("--json", action="store_true", help="for machines")
    commands.add_parser("selftest", help="run every kernel that can run here on a small problem and check its bits")
    options = parser.parse_args(arguments)
    if options.command == "info":
        report = info.collect()
        print(info.as_json(report) if options.json else info.as_text(report))
        return 0
    broken = info.import_error()
    if broken is not None:
        print(f"moekern cannot be imported: {broken}\n`python -m moekern info` tells more.", file=sys.stderr)
        return 1
    from moekern.testing import selftest

    return selftest.main()


if __name__ == "__main__":
    sys.exit(main())
