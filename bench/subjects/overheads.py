"""What surrounds the kernels: the cost of a call, of the import, of the cast, and of sharing the cores with torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report
import torch
from rich.console import Console
from timing import compete, problems
from timing.compete import Effort
from timing.measure import Contender, Samples, interleave
from timing.stock import Stock

from moekern import _C, Kernel, fp8_gemm_nt, per_block_cast_to_fp8, per_token_cast_to_fp8
from moekern.op import Op

PHASE = 12  # calls in a row, or pairs of calls in turns
IMPORT = """
import time
import torch
start = time.perf_counter()
import moekern
print(time.perf_counter() - start)
"""


def call_overhead() -> dict[str, Samples]:
    """A call so small that the kernel's own work (0.1 us at the multiply-add peak) hardly counts."""
    x, w = torch.randn(1, 128).bfloat16(), per_block_cast_to_fp8(torch.randn(128, 128))
    dense, out = torch.randn(128, 128).bfloat16(), torch.empty(1, 128, dtype=torch.bfloat16)
    return interleave(
        [
            Contender("fp8_gemm_nt(x, w)", lambda turn: fp8_gemm_nt(x, w)),
            Contender("fp8_gemm_nt(x, w, out=out)", lambda turn: fp8_gemm_nt(x, w, out=out)),
            Contender("torch.mm(x, w.T), bf16", lambda turn: torch.mm(x, dense.t())),
        ],
        budget=0.3,
        most=101,
    )


def launch_overhead() -> dict[str, Samples]:
    """Of a Triton kernel for a GPU, up to the driver: with one that does nothing. Empty where nothing compiles."""
    from moekern.backends._triton.kernels import why_not

    if why_not() is not None or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return {}
    from moekern.backends._triton import ahead, gemm
    from moekern.backends._triton.targets import TARGETS
    from moekern.backends._triton.tiles import Tiles

    target, tiles = TARGETS["sm_90"], Tiles(64, 64, 4, 3)
    x, w = per_token_cast_to_fp8(torch.randn(16, 128)), per_block_cast_to_fp8(torch.randn(128, 128))
    call = (target, lambda *_: tiles, x, w, None, None, torch.empty(16, 128, dtype=torch.bfloat16))
    [launch] = gemm.gemm(*call)
    with ahead.active(ahead.Absent(target)):
        return interleave(
            [
                Contender("plan of fp8_gemm_nt", lambda turn: gemm.gemm(*call)),
                Contender("plan and launch", lambda turn: gemm.gemm(*call)[0].run()),
                Contender("launch", lambda turn: launch.run()),
                Contender("launch by Triton's kernel[grid]", lambda turn: launch.by_triton()),
            ],
            budget=0.3,
            most=301,
        )


def native_launch_overhead() -> dict[str, Samples]:
    """Of a hand-written kernel for Hopper, up to a driver that does nothing. Empty where none is built."""
    compiler = shutil.which("cc")
    if "cuda" not in _C.native or compiler is None:
        return {}
    x, w = per_token_cast_to_fp8(torch.randn(16, 128)), per_block_cast_to_fp8(torch.randn(128, 128))
    out = torch.empty(16, 128, dtype=torch.bfloat16)
    op = Op(fp8_gemm_nt.reference, fp8_gemm_nt.prepare, "out")  # which has these kernels for what is in CPU memory
    for name, _, run, refuses, _ in _C.native["cuda"]["kernels"]["fp8_gemm_nt"]:
        op.add(Kernel(name, run, "cpu", refuses=refuses))
    call = op.prepare(x, w, out=out)
    run = op.kernels[0].run
    with tempfile.TemporaryDirectory() as folder:
        driver = Path(folder, "driver.so")
        source = Path(__file__).with_name("stub_driver.c")
        subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", driver, source], check=True)
        _C.native["cuda"]["use_driver"](str(driver))
        try:
            return interleave(
                [
                    Contender("fp8_gemm_nt(x, w, out=out) by cuda.hopper", lambda turn: op(x, w, out=out)),
                    Contender("its launch", lambda turn: run(*call)),
                ],
                budget=0.3,
                most=301,
            )
        finally:
            _C.native["cuda"]["use_driver"](None)


def import_time(times: int) -> Samples:
    """What `import moekern` adds to `import torch`, in fresh processes."""
    found = [
        subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout
        for _ in range(times)
    ]
    return Samples([float(text) for text in found])


def interference(stock: Stock, rounds: int) -> dict[str, tuple[Samples, Samples]]:
    """fp8_gemm_nt and torch.mm: seconds per call among calls of its own kind, and when the two alternate.

    Both draw cold operands either way, so what differs is whose threads ran just before.
    """
    m, n, k, side = 4, 2112, 7168, 768
    weights, x, out = stock.weights(n, k), torch.randn(m, k).bfloat16(), torch.empty(m, n, dtype=torch.bfloat16)
    dense = [matrix.float() for matrix in stock.activations(side, side).items[: stock.cold // (4 * side * side)]]
    product = torch.empty(side, side)
    calls: dict[str, Callable[[int], object]] = {
        f"fp8_gemm_nt {m}x{n}x{k}": lambda turn: fp8_gemm_nt(x, weights.next(), out=out),
        f"torch.mm f32 {side}x{side}x{side}": lambda turn: torch.mm(
            dense[turn % len(dense)], dense[(turn + 1) % len(dense)], out=product
        ),
    }
    alone = {name: Samples() for name in calls}
    alternating = {name: Samples() for name in calls}
    turn = 0
    for _ in range(rounds):
        phases = [([name] * PHASE, alone) for name in calls] + [(list(calls) * PHASE, alternating)]
        for names, samples in phases:
            for i, name in enumerate(names):
                turn += 1
                start = time.perf_counter()
                calls[name](turn)
                took = time.perf_counter() - start
                if i >= len(calls):  # the first calls still feel the phase before
                    samples[name].seconds.append(took)
    return {name: (alone[name], alternating[name]) for name in calls}


def run(console: Console, stock: Stock, effort: Effort, quick: bool) -> tuple[dict[str, Any], list[str]]:
    """Prints the table; returns it for the JSON file, and notes."""
    notes: list[str] = []
    table = report.bare_table("around the kernels", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")

    calls = call_overhead()
    for name, samples in calls.items():
        table.add_row(f"{name}, M=1 N=K=128", report.duration(samples.median), report.spread(samples))
    launches = {**launch_overhead(), **native_launch_overhead()}
    for name, samples in launches.items():
        table.add_row(f"{name}, sm_90, no driver", report.duration(samples.median), report.spread(samples))
    imported = import_time(3 if quick else 7)
    table.add_row("import moekern, torch imported", report.duration(imported.median), report.spread(imported))

    cast = problems.cast(per_token_cast_to_fp8, stock, 4096, 7168)
    rows = compete.compete(stock, "4096x7168", [cast], None, [], effort, notes)
    for row in rows:
        table.add_row(
            "per_token_cast_to_fp8, 4096x7168",
            report.duration(row.samples.median),
            f"{report.spread(row.samples)}, bf16 by {row.kernel}: {row.gbps:.1f} GB/s, {100 * row.fraction:.0f}% of "
            f"this run's copy rate, {row.limits['copy'] / 1e9:.1f} GB/s",
        )
    beside = interference(stock, 6 if quick else 20)
    for name, (alone, alternating) in beside.items():
        table.add_row(
            name,
            f"{100 * (alternating.median / alone.median - 1):+.1f}%",
            f"when it alternates with the other: {report.duration(alternating.median)} {report.spread(alternating)}, "
            f"among its own {report.duration(alone.median)} {report.spread(alone)}",
        )
    console.print()
    console.print(table)
    sections = {
        "calls": {name: samples.to_json() for name, samples in calls.items()},
        "launches": {name: samples.to_json() for name, samples in launches.items()},
        "import": imported.to_json(),
        "cast": [row.to_json() for row in rows],
        "interference": {
            name: {"alone": alone.to_json(), "alternating": alternating.to_json()}
            for name, (alone, alternating) in beside.items()
        },
    }
    return sections, notes
