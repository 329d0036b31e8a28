"""What fused_experts should give, and how far from it f32 arithmetic may end."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from moekern.experts import Expert, ExpertWeights
from moekern.ops import fused_experts
from moekern.ops.experts import gated
from moekern.ops.quantize import SMALLEST_AMAX, reference_cast, round_to_fp8
from moekern.scaled import BLOCK, MAX, ScaledTensor
from moekern.testing.numerics import GemmOracle

_U32 = 2.0**-24  # half a unit in the last place of f32, relative
_SMALLEST_F32 = 2.0**-149
_STEEPEST = 1.13  # slope of silu (1.0998, whatever alpha), gelu (1.129) and its tanh form (1.130)
_FLUSHED = 2e-36  # silu(-87): what may come to 0 below
_FORMAT = "e4m3fn"  # of a quantised h
_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(fused_experts.reference).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
}


def experts_oracle(
    x: torch.Tensor | ScaledTensor,
    experts: ExpertWeights,
    ids: torch.Tensor,
    weights: torch.Tensor | None = None,
    **options: Any,
) -> GemmOracle:
    """The float64 reference of one call, with a bound that follows errors through the expert.

    1. g and u are products of H terms: their errors dg and du are at most (H + blocks + 4) u' |x| |W|^T with
       u' = 2^-24, as in `gemm_oracle`; the fourth is the router's weight on the input. A bias rounds once more.
    2. h = a(g) (u + beta). a is no steeper than 1.13, and clamping no steeper than 1. Evaluating a costs at most
       10 u' |a| (an exponential within 2 ulp, a sum, a quotient, products) and 2 u' |g| (by rounding its argument:
       |z| s(z) (1 - s(z)) < 0.23 for a sigmoid s, |z| e^(-z^2) < 0.43 for gelu), and it may be flushed to 0 below
       -87. So dh <= |a| du + |u + beta| da + da du + 3 u' |h|.
    3. Rounding is monotone: a kernel's rounded h lies between round(h - dh) and round(h + dh), for most values one
       number, the reference's own. Where a boundary lies between, the two are a whole ulp of h's dtype apart: the
       half by which each may be off. A quantised h has a scale within the same bounds of its block's largest value.
    4. y = W h + b: what is left of dh times |W|, and the product's own error. The sum over slots rounds k + s + 1
       times.
    """
    reference = fused_experts.reference(x, experts, ids, weights, **options)
    chosen = {**_DEFAULTS, **options}
    if (expert_map := chosen["expert_map"]) is not None:
        ids = torch.where(ids < 0, -1, expert_map.long()[ids.clamp(min=0).long()])
    quantise = chosen["quantize_activations"] or isinstance(x, ScaledTensor)
    if quantise and not isinstance(x, ScaledTensor):
        x = reference_cast(x, (1, BLOCK), _FORMAT, round_scale_up=False)
    rows = x.to_float64() if isinstance(x, ScaledTensor) else x.to(torch.float64)
    dtype = None if isinstance(x, ScaledTensor) else x.dtype
    activation = {"silu": "swiglu"}.get(chosen["activation"], chosen["activation"])
    forward = _Forward(dtype, (activation, chosen["alpha"], chosen["beta"], chosen["limit"]))
    tokens, k = ids.shape
    w = torch.ones(tokens, k) if weights is None else weights
    w = w.to(torch.float64).where(ids >= 0, torch.zeros(()).double())
    on_input = chosen["apply_router_weight_on_input"]
    slots = _Products.zeros(tokens, k, rows.shape[1])
    for index in ids[ids >= 0].unique().tolist():
        t, j = (ids == index).nonzero(as_tuple=True)
        slots.put((t, j), forward(experts.expert(index), rows[t], w[t, j, None] if on_input else 1.0))
    if not chosen["reduce"]:
        return slots.flatten().oracle(reference, additions=0)
    total = slots.summed(torch.ones_like(w) if on_input else w)
    shared = chosen["shared"]
    for index in range(shared.num_experts if shared is not None else 0):
        total = total.plus(forward(shared.expert(index), rows, 1.0))
    return total.oracle(reference, additions=k + (shared.num_experts if shared is not None else 0) + 1)


@dataclass
class _Products:
    """y of some slots: the sum of what its terms may have as magnitudes, its error, and plain torch's y."""

    magnitude: torch.Tensor
    error: torch.Tensor
    plain: torch.Tensor  # f32 arithmetic

    @staticmethod
    def zeros(*shape: int) -> _Products:
        magnitude, error = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
        return _Products(magnitude, error, torch.zeros(shape))

    def put(self, where: tuple[torch.Tensor, ...], other: _Products) -> None:
        self.magnitude[where], self.error[where], self.plain[where] = other.magnitude, other.error, other.plain

    def flatten(self) -> _Products:
        return _Products(self.magnitude.flatten(0, 1), self.error.flatten(0, 1), self.plain.flatten(0, 1))

    def summed(self, w: torch.Tensor) -> _Products:
        size = w.abs().nan_to_num().unsqueeze(2)
        plain = (w.float().unsqueeze(2) * self.plain).sum(1)
        return _Products((size * self.magnitude).sum(1), (size * self.error).sum(1), plain)

    def plus(self, other: _Products) -> _Products:
        return _Products(self.magnitude + other.magnitude, self.error + other.error, self.plain + other.plain)

    def oracle(self, reference: torch.Tensor, additions: int) -> GemmOracle:
        rounding = self.error + additions * _U32 * (self.magnitude + self.error)
        return GemmOracle(reference, self.magnitude, rounding, torch.zeros_like(rounding), self.plain)


class _Forward:
    """One expert on some rows."""

    def __init__(self, dtype: torch.dtype | None, function: tuple[str, float, float, float | None]) -> None:
        self.dtype, self.function = dtype, function  # of h, None for FP8; what `gated` is told

    def __call__(self, e: Expert, x: torch.Tensor, factor: torch.Tensor | float) -> _Products:
        h, error = self._hidden(e, x, factor)
        rounded, error = self._rounded(h, error)
        _, dy, magnitude = _product(rounded, error, e.down, e.down_bias)
        return _Products(magnitude, dy, self._plain(e, x, factor))

    def _hidden(self, e: Expert, x: torch.Tensor, factor: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        """h before it is rounded, and its error."""
        activation, alpha, beta, limit = self.function
        none = torch.zeros_like(x)
        g, dg, _ = _product(factor * x, none, e.gate, e.gate_bias)
        u, du, _ = _product(factor * x, none, e.up, e.up_bias)
        if limit is not None:
            g, u = g.clamp(max=limit), u.clamp(-limit, limit)
        ones = torch.ones_like(u)
        a = gated(g, ones - beta if activation == "swiglu" else ones, activation, alpha, beta, None)
        factor_u = u + beta if activation == "swiglu" else u
        h = a * factor_u
        size, other = a.abs().nan_to_num(), factor_u.abs().nan_to_num()
        da = _STEEPEST * dg + 10 * _U32 * (size + _STEEPEST * dg) + 2 * _U32 * g.abs().nan_to_num() + _FLUSHED
        du = du + _U32 * (other + du)
        return h, size * du + other * da + da * du + 3 * _U32 * h.abs().nan_to_num() + _SMALLEST_F32

    def _rounded(self, h: torch.Tensor, error: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.dtype is not None:
            rounded, low, high = (_stored(v, self.dtype) for v in (h, h - error, h + error))
            return rounded, torch.maximum((low - rounded).abs(), (high - rounded).abs()).nan_to_num()
        rounded = reference_cast(h.to(torch.float32), (1, BLOCK), _FORMAT, round_scale_up=False).to_float64()
        size = h.abs().nan_to_num()
        scales = [_scale(v) * (1 + sign * 4 * _U32) for v, sign in ((size - error, -1), (size + error, 1))]
        worst = torch.zeros_like(h)
        for value in (h - error, h + error):
            for s in scales:
                for sign in (-1, 1):
                    code = round_to_fp8(value / s * (1 + sign * 4 * _U32), _FORMAT).to(torch.float64)
                    for decoded in scales:
                        worst = torch.maximum(worst, (code * decoded - rounded).abs().nan_to_num())
        return rounded, worst

    def _plain(self, e: Expert, x: torch.Tensor, factor: torch.Tensor | float) -> torch.Tensor:
        """What a user has without moekern: weights dequantised to f32, and F.linear."""
        gate, up, down, *biases = (None if t is None else t.float() for t in e)
        rows = x.float() * factor
        g, u = (torch.nn.functional.linear(rows.float(), w, b) for w, b in ((gate, biases[0]), (up, biases[1])))  # type: ignore[arg-type]
        h = gated(g, u, *self.function)
        if self.dtype is None:
            h = reference_cast(h, (1, BLOCK), _FORMAT, round_scale_up=False).to_float64()
        else:
            h = h.to(self.dtype)
        return torch.nn.functional.linear(h.float(), down, biases[2])  # type: ignore[arg-type]


def _product(
    a: torch.Tensor, error: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """a w^T + bias, its error when a's is `error`, and the sum of its terms' magnitudes."""
    value = a @ w.T
    weight = w.abs().nan_to_num()
    size = a.abs().nan_to_num()
    magnitude = (size + error) @ weight.T
    terms = a.shape[1] + -(-a.shape[1] // BLOCK) + 4
    n = terms * _U32
    # gemm_oracle's underflow; a scale is at most 2^16 times the largest weight of its matrix.
    decode = 1 + 2.0**16 * weight.amax() if weight.numel() else 1
    lost = terms * _SMALLEST_F32 / 2 * (1 + (size + error).amax(1, keepdim=True) * decode)
    bound = error @ weight.T + magnitude * (n / (1 - n)) + lost
    if bias is not None:
        value, magnitude = value + bias, magnitude + bias.abs().nan_to_num()
        bound = bound + 2 * _U32 * magnitude
    return value, bound, magnitude


def _stored(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(torch.float32).to(dtype).to(torch.float64)


def _scale(size: torch.Tensor) -> torch.Tensor:
    """1x128 scales of magnitudes, spread over their blocks."""
    rows, columns = size.shape
    padded = torch.zeros(rows, -(-columns // BLOCK) * BLOCK, dtype=size.dtype)
    padded[:, :columns] = size
    amax = padded.unflatten(1, (-1, BLOCK)).amax(2).clamp(min=SMALLEST_AMAX)
    return (amax / MAX[_FORMAT]).repeat_interleave(BLOCK, 1)[:, :columns]
