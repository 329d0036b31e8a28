"""The three checks on a GEMM's result: exact, elementwise bound, and no worse than plain torch.

Each raises AssertionError naming the worst element, its value, the reference and what was allowed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moekern.op import Op
from moekern.scaled import ScaledTensor

_U32 = 2.0**-24  # half a unit in the last place of f32, relative
_SMALLEST_F32 = 2.0**-149
_FEWEST = 100  # elements: two rms of 100 independent errors of one distribution differ by 2x once in 10^10


@dataclass(frozen=True)
class GemmOracle:
    """What one GEMM should give, and how far from it f32 arithmetic may end. All [M, N] float64."""

    reference: torch.Tensor
    magnitude: torch.Tensor  # |A| |B|^T + |bias| + |C|
    rounding: torch.Tensor  # bound on the error of the accumulation, before the result is stored
    underflow: torch.Tensor  # the part of what may be lost below f32's smallest number
    plain: torch.Tensor  # the plain torch path, f32: dequantise, F.linear, add

    def expected(self, dtype: torch.dtype) -> torch.Tensor:
        return self.reference.to(torch.float32).to(dtype)


def gemm_oracle(
    op: Op,
    a: torch.Tensor | ScaledTensor,
    b: ScaledTensor,
    c: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> GemmOracle:
    """The float64 reference of one call, with its error bound.

    The path of one product to the result rounds K times at most within scale blocks (its own
    rounding and K - 1 additions, in whatever order), once for each of the blocks that are added up,
    and three times for scales (a * sa, b * sb, or the sum times either). n roundings to f32 are a
    factor within 1 +- n u / (1 - n u), u = 2^-24, so

        |sum - reference| <= (K + blocks + 3) u / (1 - ...) |A| |B|^T,

    which is c (K + blocks) eps |A| |B|^T with c = 1/2 and eps = 2^-23, plus the three. Adding bias and C
    rounds twice more, each time a partial result no larger than |A| |B|^T + |bias| + |C|.

    Underflow: a kernel may scale every row of A by a power of two such that the row's largest magnitude
    stays within f32 against any weight; what a rounding then loses is at most half of f32's smallest
    number, times that power: 2^-150 of the row's largest magnitude, times the scales of b.
    """
    reference = op.reference(a, b, c, bias)
    left = (a.to_float64() if isinstance(a, ScaledTensor) else a.to(torch.float64)).abs()
    right = b.to_float64().abs()
    product = left.nan_to_num() @ right.nan_to_num().T
    addends = torch.zeros((), dtype=torch.float64)
    for term in (bias, c):
        if term is not None:
            addends = addends + term.to(torch.float64).abs().nan_to_num()
    k = left.shape[1]
    width = min(block[1] for block in (b.block, a.block if isinstance(a, ScaledTensor) else (1, 128), (1, 128)))
    blocks = -(-k // width)
    n = (k + blocks + 3) * _U32
    rounding = product * (n / (1 - n)) + 2 * _U32 * (product + addends)
    largest = left.nan_to_num().amax(1, keepdim=True) if k else left.new_zeros(left.shape[0], 1)
    decode = (
        b.scale.to(torch.float32).to(torch.float64).abs().nan_to_num().amax().clamp(min=1.0) if b.scale.numel() else 1.0
    )
    underflow = (k + blocks + 3) * _SMALLEST_F32 / 2 * (1 + largest * decode)
    return GemmOracle(reference, product + addends, rounding, underflow, plain_gemm(a, b, c, bias))


def plain_gemm(
    a: torch.Tensor | ScaledTensor, b: ScaledTensor, c: torch.Tensor | None = None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """What a user has without moekern: both operands dequantised to f32, and F.linear."""
    left = a.to_float64() if isinstance(a, ScaledTensor) else a
    result = F.linear(left.to(torch.float32), b.to_float64().to(torch.float32), None if bias is None else bias.float())
    return result if c is None else result + c.float()


def check_exact(out: torch.Tensor, oracle: GemmOracle) -> None:
    """For operands whose sums are exact in f32: every element equals the reference, rounded once to out's dtype."""
    expected = oracle.expected(out.dtype)
    wrong = (out != expected) & ~(out.isnan() & expected.isnan())
    _report("is not exact", out, oracle.reference, wrong, (out.double() - oracle.reference).abs(), None)


def check_bound(out: torch.Tensor, oracle: GemmOracle) -> None:
    """|out - reference| <= rounding + underflow + half an ulp of out, elementwise; NaN and infinity where due."""
    reference, got = oracle.reference, out.double()
    wrong_nan = got.isnan() != reference.isnan()
    _report("is NaN or is not, against the reference", out, reference, wrong_nan, wrong_nan.double(), None)
    error = oracle.rounding + oracle.underflow
    reach = reference.abs() + error  # what the accumulator may hold
    allowed = error + half_ulp(reach, out.dtype)
    finite = torch.finfo(out.dtype)
    overflows = reach >= finite.max * (1 + finite.eps / 4)  # half an ulp above the largest number
    infinite = got.isinf() & (got.sign() == reference.sign()) & (reference.isinf() | overflows)
    difference = (got - reference).abs().nan_to_num(nan=0.0)  # inf - inf, both of one sign
    wrong = (difference > allowed) & ~infinite & ~reference.isnan()
    _report("is outside the error bound", out, reference, wrong, difference / allowed.clamp(min=1e-300), allowed)


def check_rms(out: torch.Tensor, oracle: GemmOracle) -> None:
    """The rms error, relative to |A| |B|^T + |bias| + |C|, is at most twice the plain torch path's.

    Rounding the reference itself to f32 sets a floor, since where sums are short the plain path is exact
    by luck; of a handful of elements neither rms means anything.
    """
    scale = oracle.magnitude
    plain = oracle.plain.to(out.dtype).double()
    usable = (scale > 0) & out.double().isfinite() & plain.isfinite() & oracle.reference.isfinite()
    usable &= oracle.underflow < oracle.rounding
    if usable.sum() < _FEWEST:
        return
    scale = scale.where(usable, torch.ones(())).double()

    def rms(x: torch.Tensor) -> float:
        return (x / scale)[usable].square().mean().sqrt().item()

    ours, theirs = rms(out.double() - oracle.reference), rms(plain - oracle.reference)
    floor = rms(oracle.reference * _U32 + half_ulp(oracle.reference, out.dtype))
    if ours > 2 * max(theirs, floor):
        error = (out.double() - oracle.reference).abs() / scale
        _report(
            f"is worst of an rms error of {ours:.3g}; plain torch has {theirs:.3g}, and", out, oracle.reference,
            usable & (error == error[usable].max()), error, None,
        )  # fmt: skip


def half_ulp(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half the distance between neighbours of |x| in dtype: the error of rounding x to it."""
    finite = torch.finfo(dtype)
    magnitude = x.abs().nan_to_num(posinf=finite.max).clamp(finite.smallest_normal, finite.max)
    exponent = torch.frexp(magnitude)[1] - 1  # magnitude = 2^exponent * [1, 2)
    return torch.ldexp(torch.full_like(magnitude, finite.eps / 2), exponent)


def _report(
    what: str,
    out: torch.Tensor,
    reference: torch.Tensor,
    wrong: torch.Tensor,
    badness: torch.Tensor,
    allowed: torch.Tensor | None,
) -> None:
    if not wrong.any():
        return
    worst = int(badness.where(wrong, torch.tensor(-1.0, dtype=badness.dtype)).nan_to_num(posinf=1e308).argmax())
    row, col = divmod(worst, out.shape[1])
    limit = "" if allowed is None else f", allowed error {allowed[row, col].item():.6g}"
    raise AssertionError(
        f"element [{row}, {col}] {what}: it is {out[row, col].item()!r}, the reference {reference[row, col].item()!r}"
        f"{limit} ({int(wrong.sum())} of {wrong.numel()} elements of {list(out.shape)} {str(out.dtype)[6:]})"
    )
