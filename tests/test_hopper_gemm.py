"""The hand-written products of sm_90a on the specs' cases, executed by the emulated driver (emulated.py).

The cases' operands are badly aligned, which the TMA unit does not take. So are these, but for the rows of a and b.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import emulated
import pytest
import test_grouped
import test_kernels
import torch
from executors import Check, Executor, problems
from hopper_cases import emulation, executor_of

import moekern
from moekern.backends.cuda import hopper
from moekern.op import Op
from moekern.testing import cases, grouped_cases
from moekern.testing.numerics import check_exact

M_GROUPED = (moekern.m_grouped_fp8_gemm_nt_contiguous, moekern.m_grouped_fp8_gemm_nt_masked)
K_GROUPED = moekern.k_grouped_fp8_gemm_tn_contiguous


def aligned(case: Any) -> Any:
    layouts = {name: "aligned" for name in ("layout_a", "layout_b") if getattr(case, name) in ("rows", "padded")}
    return replace(case, **layouts)


def gemms() -> Iterator[cases.Gemm]:
    for case in cases.GEMM:
        if case.a == case.b == "e4m3fn":
            yield aligned(case)
    # Around the tiles, and k long enough that every ring of stages goes round; stored by the TMA unit, and not.
    for m, n, k in (
        (64, 128, 1152), (65, 576, 640), (129, 640, 130), (257, 208, 384), (300, 1040, 128), (128, 272, 1408),
        (512, 264, 256), (1, 2112, 512), (63, 200, 2176), (33, 96, 4224), (16, 1000, 896),
    ):  # fmt: skip
        for out in cases.FLOATS:
            yield cases.Gemm(m, n, k, "e4m3fn", out=out, layout_a="aligned", layout_b="aligned", layout_out="aligned")
        yield cases.Gemm(m, n, k, "e4m3fn", layout_a="aligned", layout_b="aligned", c="out", bias="bf16", out="f32")
    for values in ("codes", "all codes", "huge scales", "nan scales", "scales apart"):
        for m in (20, 200):
            yield cases.Gemm(
                m, 144, 400, "e4m3fn", layout_a="aligned", layout_b="aligned", layout_out="aligned", values=values
            )


def m_groups() -> Iterator[grouped_cases.MGrouped]:
    for case in grouped_cases.M_GROUPED:
        if case.a == case.b == "e4m3fn":
            yield aligned(case)
    for counts in ((130, 0, 1, 257, 64), (3, 5, 2, 0, 7, 1), (1,) * 40, (0, 200)):
        for n, k in ((576, 640), (208, 1152)):
            for capacity in (None, 260):
                for out in ("bf16", "f32"):
                    yield grouped_cases.MGrouped(
                        counts, n, k, "e4m3fn", capacity=capacity, out=out, layout_a="aligned", layout_b="aligned",
                        layout_out="aligned",
                    )  # fmt: skip


def k_groups() -> Iterator[grouped_cases.KGrouped]:
    for case in grouped_cases.K_GROUPED:
        if case.a == case.b == "e4m3fn":
            yield aligned(case)
    for counts in ((640, 0, 129), (127, 1), (1300,)):
        for c in (None, "out"):
            yield grouped_cases.KGrouped(
                counts, 272, 144, layout_a="aligned", layout_b="aligned", layout_out="aligned", c=c
            )


LISTS: list[tuple[Op, list[Any], Check]] = [
    (moekern.fp8_gemm_nt, list(gemms()), test_kernels.test_gemm),
    *((op, [case for case in m_groups() if case.op is op], test_grouped.test_grouped) for op in M_GROUPED),
    (K_GROUPED, list(k_groups()), test_grouped.test_grouped),
]


# ---- every kernel, whatever the model chooses

TILES = [(rows, columns, (number + turn) % 3) for turn in (0, 1) for number, (rows, columns) in enumerate(hopper.TILES)]


def with_plan(name: str, *plan: int) -> Any:
    """C++ asks once a shape: only for shapes that no other test has."""
    return mock.patch.object(hopper, name, lambda *shape: plan)


@emulation
@pytest.mark.parametrize(("rows", "columns", "shared"), TILES)
def test_every_tile(rows: int, columns: int, shared: int) -> None:
    """Of a product with a part of a tile at each end, of both operands that a cluster may share."""
    n, k = 2 * columns + 40, 301 + 3 * hopper.TILES.index((rows, columns)) + shared
    out = list(cases.FLOATS)[shared]
    case = cases.Gemm(
        rows + 70,
        n,
        k,
        "e4m3fn",
        out=out,
        layout_a="aligned",
        layout_b="aligned",
        layout_out="aligned",
        values="integers",
    )
    with with_plan("tile_plan", rows, columns, shared, 2):
        check_exact(*test_kernels.run_gemm(executor_of(moekern.fp8_gemm_nt), case))


@emulation
@pytest.mark.parametrize(("rows", "columns", "shared"), TILES)
def test_every_tile_of_groups(rows: int, columns: int, shared: int) -> None:
    n, k = columns + 72, 411 + 3 * hopper.TILES.index((rows, columns)) + shared
    case = grouped_cases.MGrouped(
        (rows + 3, 0, 65, 1), n, k, "e4m3fn", layout_a="aligned", layout_b="aligned", layout_out="aligned"
    )
    with with_plan("tile_plan", rows, columns, shared, 1):
        test_grouped.test_grouped(executor_of(case.op), case)


@emulation
@pytest.mark.parametrize("splits", hopper.STREAM_SPLITS)
@pytest.mark.parametrize("tokens", hopper.STREAM_ROWS)
def test_every_division_of_k(tokens: int, splits: int) -> None:
    """Into more parts than it has steps, too; and of more rows than a tile has."""
    case = cases.Gemm(
        min(tokens + 3, 64), 200, 513 + 16 * tokens + splits, "e4m3fn", out="f32", bias="f32", layout_a="aligned",
        layout_b="aligned",
    )  # fmt: skip
    with with_plan("stream_plan", tokens, splits):
        test_kernels.test_gemm(executor_of(moekern.fp8_gemm_nt, "hopper_stream"), case)


@emulation
def test_a_row_has_the_same_bits_among_any_others() -> None:
    g = torch.Generator().manual_seed(0)
    b = moekern.per_block_cast_to_fp8(torch.randn(336, 1536, generator=g))
    a = moekern.per_token_cast_to_fp8(torch.randn(200, 1536, generator=g))
    for name, counts in (("hopper_stream", (1, 7, 33, 64)), ("hopper", (1, 64, 129, 200))):
        executor = executor_of(moekern.fp8_gemm_nt, name)
        results = [executor(moekern.ScaledTensor(a.data[:m], a.scale[:m]), b, out_dtype=torch.float32) for m in counts]
        for result in results:
            assert torch.equal(result, results[-1][: len(result)])


# ---- the specs' cases


@pytest.mark.parametrize(("executor", "check", "case"), problems(LISTS, emulated.executors))
def test_emulated(executor: Executor, check: Any, case: Any) -> None:
    check(executor, case)
