"""The checks themselves: each must see the errors that it is there for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import moekern
from moekern.testing import cases
from moekern.testing.cases import Gemm
from moekern.testing.numerics import GemmOracle, check_bound, check_exact, check_rms, gemm_oracle, half_ulp


def problem(case: Gemm) -> tuple[torch.Tensor, GemmOracle]:
    """The rounded reference, which passes every check, and its oracle."""
    p = cases.gemm_operands(case)
    oracle = gemm_oracle(moekern.fp8_gemm_nt, p.a, p.b, p.c, p.bias)
    return oracle.expected(cases.gemm_out_dtype(case)), oracle


def spoil(row: int, col: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], None]:
    def apply(out: torch.Tensor) -> None:
        out[row, col] = change(out[row, col])

    return apply


def swap_rows(out: torch.Tensor) -> None:
    out[[4, 5]] = out[[5, 4]]


def repeat_row(out: torch.Tensor) -> None:
    out[11] = out[12]


def drop_column(out: torch.Tensor) -> None:
    out[:, 5] = 0


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("values", ["normal", "codes", "rows apart", "nan and inf", "huge", "tiny scales"])
def test_the_rounded_reference_passes(values: str, dtype: str) -> None:
    out, oracle = problem(Gemm(20, 40, 300, a="f32", out=dtype, values=values))
    check_bound(out, oracle)
    check_rms(out, oracle)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(spoil(3, 7, lambda x: x + 1), id="off by one"),
        pytest.param(spoil(19, 39, lambda x: x * torch.nan), id="NaN"),
        pytest.param(spoil(0, 0, lambda x: torch.nextafter(x, torch.tensor(torch.inf))), id="one ulp"),
        swap_rows,
        repeat_row,
        drop_column,
    ],
)
def test_exact_sees(change: Callable[[torch.Tensor], None]) -> None:
    out, oracle = problem(Gemm(20, 40, 300, a="f32", values="integers"))
    check_exact(out, oracle)
    change(out)
    with pytest.raises(AssertionError, match=r"element \[\d+, \d+\] is not exact: it is .*, the reference"):
        check_exact(out, oracle)


def test_bound_sees_one_element_of_many() -> None:
    """One element off by a thousandth of its terms, which no cosine or global norm would show."""
    out, oracle = problem(Gemm(100, 200, 300, a="f32"))
    out[57, 123] += 1e-3 * oracle.magnitude[57, 123]
    with pytest.raises(
        AssertionError, match=r"element \[57, 123\] is outside the error bound: .* allowed error .*1 of 20000"
    ):
        check_bound(out, oracle)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_bound_sees_what_is_not_finite(value: float) -> None:
    out, oracle = problem(Gemm(5, 40, 300, a="f32"))
    out[2, 3] = value
    with pytest.raises(AssertionError, match=r"\[2, 3\]"):
        check_bound(out, oracle)


def test_bound_sees_a_lost_nan() -> None:
    out, oracle = problem(Gemm(5, 40, 300, a="f32", values="nan"))
    row, col = (int(i) for i in out.isnan().nonzero()[0])
    out[row, col] = 0
    with pytest.raises(AssertionError, match=rf"\[{row}, {col}\] is NaN or is not"):
        check_bound(out, oracle)


def test_bound_sees_the_wrong_infinity() -> None:
    out, oracle = problem(Gemm(5, 40, 300, a="f32", values="huge"))
    assert out.isinf().any()
    check_bound(out, oracle)
    with pytest.raises(AssertionError, match="outside the error bound"):
        check_bound(-out, oracle)


def test_bound_sees_a_missing_scale_block() -> None:
    case = Gemm(6, 140, 300, a="f32")
    p = cases.gemm_operands(case)
    scale = p.b.scale.clone()
    scale[1, 2] = scale[0, 2]
    wrong = moekern.fp8_gemm_nt.reference(p.a, moekern.ScaledTensor(p.b.data, scale, p.b.block)).float()
    with pytest.raises(AssertionError):
        check_bound(wrong, problem(case)[1])


def test_rms_sees_a_coarser_accumulator() -> None:
    """Activations rounded to bf16 stay within a generous bound; f32 accumulation does not look like that."""
    case = Gemm(30, 40, 300, a="f32")
    p = cases.gemm_operands(case)
    coarse = moekern.fp8_gemm_nt.reference(p.a.bfloat16(), p.b).float()
    with pytest.raises(AssertionError, match="rms error"):
        check_rms(coarse, problem(case)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_ulp_is_the_error_of_rounding(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(10000, generator=g, dtype=torch.float64) * torch.exp2(
        torch.randint(-30, 15, (10000,), generator=g).double()
    )
    error = (x.to(torch.float32).to(dtype).double() - x).abs()
    limit = half_ulp(x, dtype)
    assert (error <= limit * (1 + 2**-10)).all() and (error > limit * 0.99).any()


def test_poison_surrounds_operands() -> None:
    for layout in ("rows", "padded", "columns", "every_other"):
        for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz):
            x = cases.place(torch.zeros(3, 4).to(dtype), layout)
            assert cases.only_written(x) and not x.float().any()
            whole = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
            assert int(whole.float().isnan().sum()) == whole.numel() - 12
            whole.view(torch.uint8)[-1] = 0
            assert not cases.only_written(x)
