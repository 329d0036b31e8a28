"""The kernels that are mutated, one of each that differs in more than its size, and the cases that reach all of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import test_gate
import test_grouped
import test_kernels
import test_permute
from executors import Executor
from mutation import Problem, Subject

import moekern
from moekern.testing import cases, grouped_cases
from moekern.testing.cases import Cast, Gemm
from moekern.testing.grouped_cases import KGrouped, MGrouped
from moekern.testing.numerics import check_bound, gemm_oracle
from moekern.testing.routing_cases import Gate, Permute, Unpermute

_ALIGNED = {"layout_a": "aligned", "layout_b": "aligned", "layout_out": "aligned"}
_STREAM = "sm_90.hopper_stream"


def _gemm(m: int, n: int, k: int, plan: tuple[int, ...], name: str = "sm_90.hopper", **options: Any) -> Problem:
    case = Gemm(m, n, k, a="e4m3fn", **{**_ALIGNED, **options})
    return Problem(moekern.fp8_gemm_nt, case, test_kernels.test_gemm, name, plan)


def _check_mixed(executor: Executor, case: Gemm) -> None:
    """Scales of a are float32, those of b powers of two; and the other way round."""
    plain, powers = cases.gemm_operands(case), cases.gemm_operands(replace(case, scale="ue8m0"))
    for a, b in ((plain.a, powers.b), (powers.a, plain.b)):
        out = cases.gemm_output(case, plain)[1]
        executor(a, b, out=out)
        check_bound(out, gemm_oracle(moekern.fp8_gemm_nt, a, b))


def _mixed(m: int, n: int, k: int, plan: tuple[int, ...], name: str = "sm_90.hopper") -> Problem:
    return replace(_gemm(m, n, k, plan, name), check=_check_mixed)


def _grouped(
    counts: tuple[int, ...], n: int, k: int, plan: tuple[int, ...], name: str = "sm_90.hopper", **options: Any
) -> Problem:
    case = MGrouped(counts, n, k, a="e4m3fn", **{**_ALIGNED, **options})
    return Problem(case.op, case, test_grouped.test_grouped, name, plan)


def _check_mixed_groups(executor: Executor, case: MGrouped) -> None:
    a, b, layout = grouped_cases.m_grouped_operands(case)
    powers_a, powers_b, _ = grouped_cases.m_grouped_operands(replace(case, scale="ue8m0"))
    for call in ((a, powers_b, layout), (powers_a, b, layout)):
        out = grouped_cases.owned(executor(*call), layout)
        check_bound(out, grouped_cases.m_grouped_oracle(case.op, *call))


def _mixed_groups(
    counts: tuple[int, ...], n: int, k: int, plan: tuple[int, ...], name: str = "sm_90.hopper"
) -> Problem:
    return replace(_grouped(counts, n, k, plan, name), check=_check_mixed_groups)


def _dense(rows: int, columns: int, k: int) -> Subject:
    """k: so many steps that each block goes round its ring of stages more than twice."""
    return Subject(
        "gemm",
        f"hopper_gemm_{rows}x{columns}",
        (
            _gemm(40, columns + 16, 264, (rows, columns, 0, 1), scale="ue8m0", out="f16"),
            _mixed(44, columns + 16, 264, (rows, columns, 0, 1)),
            _gemm(rows - 4, columns + 16, 520, (rows, columns, 0, 1), values="scales apart", out="f32"),
            _gemm(rows + 12, columns + 16, 264, (rows, columns, 0, 1), bias="f32", c="f32", out="f32"),
            _gemm(rows + 22, columns + 16, k, (rows, columns, 0, 1)),
            _gemm(rows + 24, 2 * columns + 16, k, (rows, columns, 1, 2), out="f32"),
            _gemm(2 * rows + 26, columns + 16, k, (rows, columns, 2, 1)),
        ),
        maps=3,
    )


SUBJECTS = (
    _dense(128, 48, 1160),
    _dense(256, 96, 520),
    Subject(
        "gemm_grouped",
        "hopper_grouped_gemm_128x64",
        (
            # First, as it is the first call whose tensor maps are changed: with a last row that the TMA unit stores.
            _grouped((208,), 80, 520, (128, 64, 2, 1), capacity=208),
            _grouped((20, 1), 80, 264, (128, 64, 0, 1), scale="ue8m0", out="f16"),
            _mixed_groups((20, 2), 80, 264, (128, 64, 0, 1)),
            _grouped((20, 3), 80, 1160, (128, 64, 0, 1), values="scales apart", out="f32"),
            _grouped((130, 0, 19, 1), 144, 520, (128, 64, 0, 2), alignment=16, spare=3),
            _grouped((130, 0, 19), 144, 520, (128, 64, 1, 1), capacity=140, out="f32"),
        ),
        maps=3,
    ),
    Subject(
        "gemm_stream",
        "hopper_gemm_stream_16",
        (
            _gemm(10, 72, 520, (16, 1), _STREAM, scale="ue8m0", out="f16"),
            _mixed(12, 72, 264, (16, 1), _STREAM),
            _gemm(16, 72, 1160, (16, 2), _STREAM, values="scales apart", out="f32"),
            _gemm(15, 72, 520, (16, 2), _STREAM, bias="f32", c="f32", out="f32"),
            _gemm(14, 136, 1160, (16, 4), _STREAM, out="f32"),
            _gemm(13, 72, 2696, (16, 1), _STREAM),
        ),
        maps=2,
    ),
    Subject(
        "gemm_stream",
        "hopper_grouped_gemm_stream_8",
        (
            _grouped((3, 1), 72, 264, (8, 1), _STREAM, scale="ue8m0", out="f16"),
            _mixed_groups((4, 1), 72, 264, (8, 1), _STREAM),
            _grouped((5, 1), 72, 1160, (8, 2), _STREAM, values="scales apart", out="f32"),
            _grouped((3, 0, 8, 1), 72, 520, (8, 2), _STREAM, capacity=9, out="f32"),
            _grouped((3, 0, 9), 72, 3208, (8, 1), _STREAM),
        ),
        maps=2,
    ),
    Subject(
        "gemm_k_grouped",
        "hopper_k_grouped_gemm",
        tuple(
            Problem(case.op, case, test_grouped.test_grouped)
            for case in (
                KGrouped((128, 0, 384), 144, 144, **_ALIGNED),
                KGrouped((128, 256), 144, 144, out="f32", c="f32", **_ALIGNED),
                KGrouped((128, 256), 144, 144, out="bf16", **_ALIGNED),
                KGrouped((128, 256), 144, 144, scale="ue8m0", **_ALIGNED),
                KGrouped((128, 256), 144, 144, values="scales apart", **_ALIGNED),
            )
        ),
        maps=3,
    ),
    Subject(
        "permute_sort",
        "permute_sort",
        tuple(
            Problem(moekern.moe_permute, case, test_permute.test_permute)
            for case in (
                Permute(300, 16, 33, 7, alignment=4),
                Permute(3000, 4, 33, 7, routing="skewed", alignment=2),
                Permute(1100, 8, 1500, 5, routing="skips"),
                # More experts than threads, whose sums are scanned in turns.
                Permute(40, 4, 300, 3),
                Permute(20, 4, 150, 3, alignment=2),
            )
        ),
    ),
    Subject(
        "permute_cast",
        "permute_cast_elements",
        tuple(
            Problem(moekern.moe_permute, case, test_permute.test_permute)
            for case in (
                Permute(33, 264, 6, 3, x="f32", format="e4m3fn", routing="skips", alignment=4),
                Permute(9, 264, 5, 3, format="e4m3fn"),
            )
        ),
    ),
    Subject(
        "unpermute",
        "unpermute_elements",
        tuple(
            Problem(moekern.moe_unpermute, case, test_permute.test_unpermute)
            for case in (
                Unpermute(23, 70, 9, 40, y="f32", skips="some"),
                Unpermute(9, 70, 9, 40, layout="columns"),
            )
        ),
    ),
    Subject(
        "gate",
        "gate_8",
        tuple(
            Problem(moekern.moe_gate, case, test_gate.test_gate)
            for case in (
                Gate(9, 256, 8, scoring="sigmoid", bias="f32", groups=8, kept=4, renormalize=True),
                Gate(7, 100, 6, logits="bf16"),
            )
        ),
    ),
    Subject(
        "cast",
        "cast_128x1_elements",
        tuple(
            Problem(
                moekern.per_channel_cast_to_fp8,
                Cast("per_channel_cast_to_fp8", 300, 45, x=x, format=format),
                test_kernels.test_cast,
            )
            for x, format in (("f32", "e4m3fn"), ("bf16", "e4m3fnuz"), ("f16", "e5m2"))
        ),
    ),
    Subject(
        "silu_mul_cast",
        "silu_mul_cast_elements",
        tuple(
            Problem(moekern.silu_mul_cast_to_fp8, Cast("silu_mul_cast_to_fp8", 5, 264, x=x), test_kernels.test_cast)
            for x in ("f32", "bf16")
        ),
    ),
)
