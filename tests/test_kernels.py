"""Every kernel of every op on every case, against the float64 reference.

A new kernel or case adds no test code: kernels come from Op.kernels, cases from moekern.testing.cases.
"""

from __future__ import annotations

import functools

import executors
import pytest
import torch

import moekern
from moekern.ops.quantize import reference_cast
from moekern.scaled import MAX, ScaledTensor
from moekern.testing import cases
from moekern.testing.numerics import GemmOracle, check_bound, check_exact, check_rms, gemm_oracle, half_ulp

CASTS = (
    moekern.per_token_cast_to_fp8,
    moekern.per_block_cast_to_fp8,
    moekern.per_channel_cast_to_fp8,
    moekern.silu_mul_cast_to_fp8,
)


@functools.lru_cache(maxsize=2)  # a case and its exact twin, for all kernels in turn
def gemm_problem(case: cases.Gemm) -> tuple[cases.GemmOperands, GemmOracle]:
    p = cases.gemm_operands(case)
    return p, gemm_oracle(moekern.fp8_gemm_nt, p.a, p.b, p.c, p.bias)


def run_gemm(executor: executors.Executor, case: cases.Gemm) -> tuple[torch.Tensor, GemmOracle]:
    """The result of one kernel on one case, and what it should be."""
    operands, oracle = gemm_problem(case)
    c, out = cases.gemm_output(case, operands)
    result = executor(operands.a, operands.b, c, operands.bias, out)
    assert cases.only_written(out), "wrote outside of out"
    return out if result is None else result, oracle


@executors.of(moekern.fp8_gemm_nt)
@pytest.mark.parametrize("case", cases.GEMM, ids=str)
def test_gemm(executor: executors.Executor, case: cases.Gemm) -> None:
    if (exact := cases.exact(case)) is not None:
        check_exact(*run_gemm(executor, exact))
    result, oracle = run_gemm(executor, case)
    check_bound(result, oracle)
    check_rms(result, oracle)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Equal bit for bit; any NaN equals any other."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    both_nan = got.float().isnan() & expected.float().isnan()
    wrong = (bits(got) != bits(expected)) & ~both_nan
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}{list(at)} is {got[at].float().item()!r}, the reference {expected[at].float().item()!r} "
            f"({int(wrong.sum())} of {wrong.numel()} differ)"
        )


@functools.lru_cache(maxsize=1)
def cast_problem(op: moekern.Op, case: cases.Cast) -> tuple[torch.Tensor, ScaledTensor]:
    x = cases.cast_input(case)
    return x, op.reference(x, case.format, case.round_scale_up)


@pytest.mark.parametrize(
    ("executor", "case"),
    [(e, case) for op in CASTS for case in cases.CAST if case.op == op.name for e in executors.executors(op)],
    ids=str,
)
def test_cast(executor: executors.Executor, case: cases.Cast) -> None:
    x, expected = cast_problem(executor.op, case)
    out = ScaledTensor(
        cases.place(expected.data, case.layout_out), cases.place(expected.scale, "columns"), expected.block
    )
    out.data.view(torch.uint8).fill_(0x55)
    out.scale.fill_(-1)
    executor(x, case.format, case.round_scale_up, out)
    assert cases.only_written(out.data), "wrote outside of out.data"
    assert cases.only_written(out.scale), "wrote outside of out.scale"
    if case.op == "silu_mul_cast_to_fp8":
        check_silu_mul(x, out, case)
    else:
        assert_same_bits(out.scale, expected.scale, "scale")
        assert_same_bits(out.data, expected.data, "data")


def check_silu_mul(x: torch.Tensor, out: ScaledTensor, case: cases.Cast) -> None:
    """Scales within 8 ulp (one binade more where they are rounded up), values within half an FP8 ulp of the product.

    silu is within 4 ulp of f32, the product and the scale round once more each.
    """
    slack = 8 * 2.0**-23
    gate, up = x.double().chunk(2, dim=1)
    y = gate * torch.sigmoid(gate) * up
    expected = reference_cast(y.float(), out.block, case.format, round_scale_up=False)
    low, high = expected.scale.double() * (1 - slack), expected.scale.double() * (1 + slack)
    if case.round_scale_up:
        finite = out.scale.isfinite()
        assert (torch.frexp(out.scale[finite])[0] == 0.5).all(), "scale is not a power of two"
        high = high * 2
    scale = out.scale.double()
    assert torch.equal(scale.isnan(), expected.scale.isnan()), "scale is NaN where none is due, or not where it is"
    assert torch.equal(scale.isinf(), expected.scale.isinf()), "scale is infinite where none is due, or not where it is"
    assert ((scale >= low) & (scale <= high) | ~scale.isfinite()).all(), "scale is off"
    spread = scale.repeat_interleave(out.block[1], 1)[:, : y.shape[1]]
    finite = y.isfinite() & spread.isfinite()
    q = out.data.double()
    assert torch.equal(q.isnan(), (y / spread).isnan() | (y * (1 / spread)).isnan()), (
        "NaN where none is due, or none where one is"
    )
    scaled = (y / spread).clamp(-MAX[case.format], MAX[case.format])
    error = (q - scaled).abs()
    allowed = half_ulp(scaled, out.data.dtype) + scaled.abs() * slack
    wrong = finite & (error > allowed)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"data{list(at)} is {q[at].item()}, the reference {scaled[at].item()}, allowed error {allowed[at].item()}"
        )


@functools.lru_cache(maxsize=1)
def dequantize_problem(case: cases.Dequantize) -> tuple[ScaledTensor, torch.Tensor]:
    x = cases.dequantize_input(case)
    return x, moekern.dequantize.reference(x).to(torch.float32).to(cases.FLOATS[case.out])


@executors.of(moekern.dequantize)
@pytest.mark.parametrize("case", cases.DEQUANTIZE, ids=str)
def test_dequantize(executor: executors.Executor, case: cases.Dequantize) -> None:
    x, expected = dequantize_problem(case)
    out = cases.place(torch.zeros_like(expected), case.layout_out)
    executor(x, out)
    assert cases.only_written(out), "wrote outside of out"
    assert_same_bits(out, expected, "out")
