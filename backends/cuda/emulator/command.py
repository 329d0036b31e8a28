"""`python -m moekern emulate`: what kernels a PTX file has, and what happens when one runs."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from moekern.backends.cuda.emulator.driver import Fault
from moekern.backends.cuda.emulator.module import Kernel, Module
from moekern.backends.cuda.emulator.tensor_maps import TensorMap

_VALUE = """one for each parameter: a number; an array as float32[64,128], float32[64]=random or float32[64]=1.5; a file
as x.npy; a tensor map as map:uint8[64,128],box=64x128,swizzle=128"""
_ARRAY = re.compile(r"(?P<dtype>[a-z][a-z0-9_]*)\[(?P<shape>\d+(?:,\d+)*)\](?:=(?P<fill>[a-z0-9.+-]+))?$")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="PTX text")
    parser.add_argument("--kernel", help="run this one; without it, the file's kernels are listed")
    parser.add_argument("--grid", type=_sizes, default=(1,), metavar="X[,Y[,Z]]")
    parser.add_argument("--block", type=_sizes, default=(32,), metavar="X[,Y[,Z]]")
    parser.add_argument("--cluster", type=_sizes, metavar="X[,Y[,Z]]")
    parser.add_argument("--shared-bytes", type=int, default=0, help="dynamic shared memory")
    parser.add_argument("--argument", action="append", default=[], dest="arguments", metavar="VALUE", help=_VALUE)
    parser.add_argument(
        "--schedule", default="round_robin", choices=("round_robin", "random", "producer_greedy", "consumer_greedy")
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sms", type=int, default=8, help="of the emulated device")
    parser.add_argument("--accumulation", default="exact", choices=("exact", "hopper"))
    parser.add_argument("--no-races", action="store_true", help="several times as fast, without the checker of races")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write the arrays there when the kernel has ended")


def run(options: argparse.Namespace) -> int:
    try:
        module = Module(options.file.read_bytes())
        kernels = module.kernels()
        if options.kernel is None:
            print("\n".join(_described(kernel) for kernel in kernels.values()))
            return 0
        if options.kernel not in kernels:
            print(f"{options.file} has no kernel {options.kernel}; it has {', '.join(kernels) or 'none'}")
            return 1
        arguments = [_argument(text, number) for number, text in enumerate(options.arguments)]
        told = module.launch(
            options.kernel, options.grid, options.block, arguments, cluster=options.cluster,
            shared_bytes=options.shared_bytes, schedule=options.schedule, seed=options.seed, races=not options.no_races,
            sms=options.sms, accumulation=options.accumulation,
        )  # fmt: skip
    except (Fault, OSError, RuntimeError, ValueError) as failure:
        print(failure)
        return 1
    print(
        f"{told.kernel}: no fault. {told.instructions} warp instructions, {told.products} wgmma, "
        f"{told.bulk_copies} bulk copies of {told.bulk_bytes} bytes, {told.seconds:.3f} s"
    )
    for name, count in sorted(told.opcodes.items(), key=lambda item: -item[1])[:12]:
        print(f"  {count:10} {name}")
    _save(arguments, options.save)
    return 0


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _described(kernel: Kernel) -> str:
    lines = [
        f"{kernel.name}: {kernel.instructions} instructions, {kernel.registers} registers named, {kernel.shared_bytes} "
        f"bytes of static shared and {kernel.local_bytes} of local memory"
        + (f", at most {kernel.threads} threads" if kernel.threads else "")
    ]
    lines += [f"  .{p.type:5} {p.bytes:5} bytes at {p.offset:5}  {p.name}" for p in kernel.parameters]
    if kernel.unknown:
        lines.append("  cannot be executed: " + ", ".join(kernel.unknown))
    return "\n".join(lines)


def _argument(text: str, number: int) -> Any:
    import numpy as np

    if text.startswith("map:"):
        spec, *options = re.split(r",(?=[a-z]+=)", text[4:])
        named = dict(option.split("=") for option in options)
        box = [int(n) for n in named.pop("box").split("x")]
        return TensorMap(_argument(spec, number), box, swizzle=int(named.pop("swizzle", 0)), **named)
    if text.endswith(".npy"):
        return np.load(text)
    if match := _ARRAY.match(text):
        shape = [int(n) for n in match["shape"].split(",")]
        dtype = np.dtype(match["dtype"])
        if match["fill"] == "random":
            return np.random.default_rng(number).standard_normal(shape).astype(dtype)
        return np.full(shape, float(match["fill"] or 0)).astype(dtype)
    try:
        return int(text, 0)
    except ValueError:
        return float(text)


def _save(arguments: list[Any], folder: Path | None) -> None:
    import numpy as np

    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for number, x in enumerate(arguments):
        array = x.array if isinstance(x, TensorMap) else x
        if isinstance(array, np.ndarray):
            np.save(folder / f"argument{number}.npy", array)
