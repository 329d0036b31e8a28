"""Triton's own PTX for sm_90 in the emulator: the library's launches, on CPU tensors, with barriers, layouts and races.

    python tests/emulated_triton.py [WORD]     every problem whose name has WORD, one object of JSON a line

A process of its own, since Triton compiles nothing where TRITON_INTERPRET was set when it came.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import test_gate
import test_grouped
import test_kernels
import torch
from executors import Executor

import moekern
from moekern.backends._triton.targets import TARGETS
from moekern.backends._triton.tiles import Tiles
from moekern.backends.cuda import tiles
from moekern.backends.cuda.emulator import Module
from moekern.op import Op
from moekern.testing import cases, grouped_cases, routing_cases
from moekern.testing.numerics import check_bound, check_rms, gemm_oracle

TARGET = replace(TARGETS["sm_90"], processors=3)  # few programs, so that each has several tiles


@dataclass(frozen=True)
class Problem:
    op: Op
    case: Any
    check: Callable[[Executor, Any], None]
    few: bool = False  # by the kernel for few rows

    def __str__(self) -> str:
        return f"{self.op.name}{'=few' if self.few else ''}-{self.case}"


def by_descriptors(target: Any, shape: Any) -> Tiles:
    """The library's tiles, but descriptors wherever operands allow it: sizes here are too small to pay."""
    if not shape.described:
        return tiles.choose(target, shape)
    return (tiles._SPECIALISED if shape.groups == 1 else tiles._DESCRIBED)[target.name]


@dataclass(frozen=True)
class Aligned:
    """A product of operands that a descriptor can name: those of cases.py begin at odd addresses."""

    counts: tuple[int, ...] | None
    m: int
    n: int
    k: int
    factor: float = 1.0  # 1e30: sums overflow, so that a repair follows

    def __str__(self) -> str:
        return f"described-{self.m}x{self.n}x{self.k}" + ("-overflow" if self.factor > 1 else "")


def check_described(executor: Executor, case: Aligned) -> None:
    g = torch.Generator().manual_seed(0)
    groups = len(case.counts or (0,))
    a = moekern.per_token_cast_to_fp8(torch.randn(case.m, case.k, generator=g))
    b = moekern.per_block_cast_to_fp8(torch.randn(groups * case.n, case.k, generator=g))
    a, b = (moekern.ScaledTensor(x.data, x.scale * case.factor, x.block) for x in (a, b))
    b.scale[len(b.scale) // 2 :] = 1e-3  # other columns and groups stay finite
    call: tuple[Any, ...] = (a, b)
    if case.counts is None:
        out = cases.place(torch.full((case.m, case.n), torch.nan), "padded")
        executor(*call, out=out)
        assert cases.only_written(out), "wrote outside of out"
        oracle = gemm_oracle(executor.op, *call)
    else:
        stacked = b.data.view(groups, case.n, case.k), b.scale.view(groups, -1, b.scale.shape[1])
        call = (a, moekern.ScaledTensor(*stacked, b.block), moekern.GroupedLayout.from_counts(case.counts, 16, case.m))
        out = torch.full((case.m, case.n), grouped_cases.UNTOUCHED)
        executor(*call, out=out)
        assert grouped_cases.untouched(out, call[2]), "wrote rows of no group"
        oracle = grouped_cases.m_grouped_oracle(executor.op, *call)
        out = grouped_cases.owned(out, call[2])
    check_bound(out, oracle)
    check_rms(out, oracle)


def problems() -> Iterator[Problem]:
    gemm, grouped = moekern.fp8_gemm_nt, moekern.m_grouped_fp8_gemm_nt_contiguous
    for factor in (1.0, 1e30):
        yield Problem(gemm, Aligned(None, 272, 384, 656, factor), check_described)
        yield Problem(grouped, Aligned((70, 33), 160, 256, 400, factor), check_described)
    yield Problem(gemm, cases.Gemm(19, 65, 264), test_kernels.test_gemm)
    for few in (False, True):
        yield Problem(gemm, cases.Gemm(19, 65, 264, a="e4m3fn"), test_kernels.test_gemm, few)
    yield Problem(grouped, grouped_cases.MGrouped((2, 19, 0, 1), 96, 264, a="e4m3fn"), test_grouped.test_grouped)
    for op in (moekern.per_token_cast_to_fp8, moekern.silu_mul_cast_to_fp8):
        yield Problem(op, cases.Cast(op.name, 9, 267), test_kernels.test_cast)
    gate = {"scoring": "sigmoid", "bias": "f32", "groups": 8, "kept": 4, "renormalize": True}
    for values in ("normal", "ties"):
        yield Problem(moekern.moe_gate, routing_cases.Gate(9, 256, 8, values=values, **gate), test_gate.test_gate)


def run(launch: Any, stream: int | None = None) -> None:
    """In place of Launch.run."""
    if not all(launch.grid):
        return
    compiled = launch.compile(TARGET)
    metadata, programs = compiled.metadata, math.prod(launch.grid)
    scratch = torch.empty(metadata.global_scratch_size * programs + metadata.global_scratch_align, dtype=torch.uint8)
    aligned = scratch[-scratch.data_ptr() % metadata.global_scratch_align :]
    kinds = compiled.src.signature.items()
    given = [launch.arguments[name] for name, kind in kinds if kind != "constexpr"]
    given += [aligned, 0]  # and nothing to write profiles to
    text = compiled.asm["ptx"]
    Module(text).launch(metadata.name, launch.grid, _threads(text), given, shared_bytes=metadata.shared)


def _threads(text: str) -> int:
    """Of a block, with the warps that were specialised."""
    found = re.search(r"\.reqntid\s+(\d+)", text)
    assert found is not None
    return int(found[1])


def executor(problem: Problem) -> Executor:
    from moekern.backends._triton.kernels import Family, kernels
    from moekern.backends._triton.launch import Launch

    op = problem.op
    family = Family("cpu", "sm_90", lambda where: TARGET, by_descriptors, tiles.choose_for_few_rows)
    kernel = [kernel for of, kernel in kernels(family) if of is op][0 if problem.few else -1]

    def compute(*args: Any, **kwargs: Any) -> Any:
        call = op.prepare(*args, **kwargs)
        with mock.patch.object(Launch, "run", run):
            kernel.run(*call)
        return call[op.output_index]

    return Executor(
        op, kernel.name, compute, None, lambda *args, **kwargs: kernel.refuses(*op.prepare(*args, **kwargs))
    )


def main() -> int:
    os.environ.pop("TRITON_INTERPRET", None)
    words = sys.argv[1:]
    for problem in problems():
        if all(word in str(problem) for word in words):
            started, said = time.perf_counter(), None
            try:
                problem.check(executor(problem), problem.case)
            except Exception as error:  # a fault, a difference, or what the emulator lacks
                said = f"{type(error).__name__}: {error}"
            print(json.dumps([str(problem), said, round(time.perf_counter() - started, 2)]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
