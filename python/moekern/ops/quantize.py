"""Casts to FP8 with block scales, and back. Next: op.py, then backends/<device>/."""

from __future__ import annotations

from typing import Any

import torch

from moekern import _C
from moekern.op import op
from moekern.scaled import BLOCK, DTYPES, MAX, ScaledTensor, as_scaled, as_tensor

SMALLEST_AMAX = 1e-4  # DeepSeek-V3's and DeepGEMM's clamp: an all-zero block gets a finite scale


def reference_cast(x: torch.Tensor, block: tuple[int, int], format: str, round_scale_up: bool) -> ScaledTensor:
    """Every cast's oracle: s = max(amax, 1e-4) / max, q = rne(clamp(x * (1 / s), +-max)), in f32 and integers."""
    x = x.to(torch.float32)
    rows, cols = x.shape
    grid = (-(-rows // block[0]), -(-cols // block[1]))
    padded = torch.zeros(grid[0] * block[0], grid[1] * block[1])
    padded[:rows, :cols] = x
    amax = padded.reshape(grid[0], block[0], grid[1], block[1]).abs().amax(dim=(1, 3))  # amax keeps NaN
    scale = torch.where(amax < SMALLEST_AMAX, torch.tensor(SMALLEST_AMAX), amax) / MAX[format]
    if round_scale_up:
        mantissa, exponent = torch.frexp(scale)
        power = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
        scale = torch.where(scale.isfinite(), power, scale)
    spread = (1.0 / scale).repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :cols]
    return ScaledTensor(round_to_fp8(x * spread, format), scale, block)


def round_to_fp8(y: torch.Tensor, format: str) -> torch.Tensor:
    """f32 -> nearest FP8, ties to even, saturating; by search in the format's own table of values."""
    codes = torch.arange(128, dtype=torch.uint8)
    values = codes.view(DTYPES[format]).to(torch.float64)
    finite = values[values.isfinite()]  # ascending, code == index
    magnitude = y.to(torch.float64).abs().nan_to_num(nan=0.0).clamp(max=MAX[format]).contiguous()
    above = torch.searchsorted(finite, magnitude).clamp(max=len(finite) - 1)
    below = (above - 1).clamp(min=0)
    to_above, to_below = finite[above] - magnitude, magnitude - finite[below]
    tie_to_below = (to_above == to_below) & (below % 2 == 0)
    code = torch.where((to_below < to_above) | tie_to_below, below, above).to(torch.uint8)
    negative = torch.signbit(y)
    nan = y.isnan()
    if format == "e4m3fnuz":  # one NaN, no negative zero
        code = torch.where(negative & (code != 0), code | 0x80, code)
        return torch.where(nan, torch.tensor(0x80, dtype=torch.uint8), code).view(DTYPES[format])
    quiet = torch.tensor(0x7E if format == "e5m2" else 0x7F, dtype=torch.uint8)
    return (torch.where(nan, quiet, code) | negative.to(torch.uint8) << 7).view(DTYPES[format])


def _prepare_block(name: str, block: tuple[int, int], gated: bool = False) -> Any:
    def prepare(
        x: Any, format: str = "e4m3fn", round_scale_up: bool = False, out: ScaledTensor | None = None
    ) -> tuple[Any, ...]:
        if not isinstance(round_scale_up, bool):
            raise TypeError(f"{name}: round_scale_up is {round_scale_up!r}; it is True or False")
        x, out = _C.prepare_cast(name, as_tensor(x, f"{name}: x"), out, format, *block, gated)
        return x, out.format, round_scale_up, out

    return prepare


@op(prepare=_prepare_block("per_token_cast_to_fp8", (1, BLOCK)))
def per_token_cast_to_fp8(
    x: torch.Tensor, format: str = "e4m3fn", round_scale_up: bool = False, out: ScaledTensor | None = None
) -> ScaledTensor:
    """Quantise activations: one scale per token (row) and 128 columns.

    s[m, kb] = max(max |x[m, kb]|, 1e-4) / max(format),  q = rne(clamp(x * (1 / s), +-max)),  x ~ q * s

    x: [M, K] float32, float16 or bfloat16. K need not be a multiple of 128.
    format: "e4m3fn" (max 448), "e4m3fnuz" (240) or "e5m2" (57344).
    round_scale_up: make every scale a power of two (the ue8m0 convention), rounding up.
    out: a ScaledTensor to write to: data [M, K], float32 scale [M, ceil(K / 128)], block (1, 128).

    Rounds to nearest even, saturates, keeps NaN: the same bits on every device. Unpacks to (q, s).
    Method: DeepSeek-V3 (arXiv:2412.19437, section 3.3.2).
    """
    return reference_cast(x, (1, BLOCK), format, round_scale_up)


@op(prepare=_prepare_block("per_block_cast_to_fp8", (BLOCK, BLOCK)))
def per_block_cast_to_fp8(
    x: torch.Tensor, format: str = "e4m3fn", round_scale_up: bool = False, out: ScaledTensor | None = None
) -> ScaledTensor:
    """Quantise weights: one scale per 128 x 128 block. Otherwise as `per_token_cast_to_fp8`."""
    return reference_cast(x, (BLOCK, BLOCK), format, round_scale_up)


@op(prepare=_prepare_block("per_channel_cast_to_fp8", (BLOCK, 1)))
def per_channel_cast_to_fp8(
    x: torch.Tensor, format: str = "e4m3fn", round_scale_up: bool = False, out: ScaledTensor | None = None
) -> ScaledTensor:
    """Quantise for weight gradients: one scale per column and 128 rows. Otherwise as `per_token_cast_to_fp8`."""
    return reference_cast(x, (BLOCK, 1), format, round_scale_up)


@op(prepare=_prepare_block("silu_mul_cast_to_fp8", (1, BLOCK), gated=True))
def silu_mul_cast_to_fp8(
    x: torch.Tensor, format: str = "e4m3fn", round_scale_up: bool = False, out: ScaledTensor | None = None
) -> ScaledTensor:
    """y = silu(gate) * up, quantised as by `per_token_cast_to_fp8`, in one pass.

    y[m, i] = x[m, i] / (1 + exp(-x[m, i])) * x[m, I + i]

    x: [M, 2 I], the gate half before the up half. The result is [M, I]. silu is within 4 ulp of
    exact in float32 for gate > -87, so a value on a rounding edge may take the neighbouring FP8 code.
    """
    gate, up = x.to(torch.float64).chunk(2, dim=1)
    return reference_cast((gate * torch.sigmoid(gate) * up).to(torch.float32), (1, BLOCK), format, round_scale_up)


def _prepare_dequantize(
    x: Any, out: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
) -> tuple[Any, ...]:
    x, out = _C.prepare_dequantize(as_scaled(x, "dequantize: x"), out, out_dtype)
    return x, out, out_dtype


@op(prepare=_prepare_dequantize)
def dequantize(x: ScaledTensor, out: torch.Tensor | None = None, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """D = cast(q * s), the product rounded to float32 and then to `out_dtype` (float32 by default).

    x: a ScaledTensor or (data, scale), [M, K]. out: [M, K] float32, float16 or bfloat16.
    """
    return x.to_float64()
