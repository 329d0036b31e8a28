"""Rounding to FP8, value by value, against integer arithmetic that shares nothing with the library."""

from __future__ import annotations

import executors
import ml_dtypes
import numpy as np
import pytest
import torch

import moekern
from moekern.ops.quantize import round_to_fp8
from moekern.scaled import BLOCK, DTYPES, MAX, ScaledTensor
from moekern.testing.cases import FLOATS

LAYOUT = {"e4m3fn": (3, 7), "e4m3fnuz": (3, 8), "e5m2": (2, 15)}  # mantissa bits, bias


def integer_round(x: np.ndarray, format: str) -> np.ndarray:
    """f32 -> code of the nearest value, ties to even, saturating; the sign of a zero stays. No NaN in x.

    |x| = significand * 2^(exponent - 150). The format's grid at |x| has steps of 2^step; the quotient
    by that step is rounded in integers, and renormalised when it reaches the next binade.
    """
    mantissa_bits, bias = LAYOUT[format]
    word = x.astype(np.float32).view(np.uint32).astype(np.int64)
    exponent = np.maximum(word >> 23 & 0xFF, 1)
    significand = np.where((word >> 23 & 0xFF) > 0, word & 0x7FFFFF | 0x800000, word & 0x7FFFFF)
    step = np.maximum(exponent - 127, 1 - bias) - mantissa_bits
    shift = np.minimum(step - (exponent - 150), 40)  # > 0: f32 is finer than any of these formats
    quotient, remainder = significand >> shift, significand & ((1 << shift) - 1)
    half = 1 << (shift - 1)
    quotient += (remainder > half) | ((remainder == half) & (quotient & 1 == 1))
    binade = np.maximum(step + mantissa_bits + bias - 1, 0)  # 0 for subnormals and the first normal binade
    code = (binade << mantissa_bits) + quotient
    code = np.where(np.isinf(x), 255, code)
    largest = {"e4m3fn": 0x7E, "e4m3fnuz": 0x7F, "e5m2": 0x7B}[format]
    code = np.minimum(code, largest) | (word >> 31 & 1) << 7
    return np.where((format == "e4m3fnuz") & (code == 0x80), 0, code).astype(np.uint8)


def every_value(dtype: str) -> torch.Tensor:
    """All finite bf16 or f16 values; for f32 random bits, and the neighbourhood of every rounding boundary."""
    if dtype != "f32":
        x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(FLOATS[dtype])
        return x[x.isfinite()]
    g = torch.Generator().manual_seed(0)
    parts = [torch.randint(-(2**31), 2**31, (1 << 15,), generator=g).to(torch.int32)]
    for format in DTYPES.values():
        values = torch.arange(256, dtype=torch.uint8).view(format).double()
        values = values[values.isfinite()].sort().values
        edges = torch.cat([values, (values[1:] + values[:-1]) / 2]).float().view(torch.int32)
        parts += [edges + offset for offset in (-1, 0, 1)]
    x = torch.cat(parts).view(torch.float32)
    return x[x.isfinite()]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("format", DTYPES)
def test_reference_is_integer_exact(format: str, dtype: str) -> None:
    x = every_value(dtype).float()
    got = round_to_fp8(x, format).view(torch.uint8).numpy()
    assert np.array_equal(got, integer_round(x.numpy(), format))


@pytest.mark.parametrize("format", DTYPES)
def test_integer_rounding_agrees_with_ml_dtypes(format: str) -> None:
    """Where the rules are the same: ml_dtypes overflows to NaN or infinity, a cast here saturates."""
    x = every_value("f32").numpy()
    x = x[np.abs(x) <= MAX[format]]
    theirs = x.astype(getattr(ml_dtypes, f"float8_{format}")).view(np.uint8)
    assert np.array_equal(theirs, integer_round(x, format))


@executors.of(moekern.per_token_cast_to_fp8)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("format", DTYPES)
def test_every_value_at_scale_one(executor: executors.Executor, format: str, dtype: str) -> None:
    """A block whose largest value is the format's maximum has scale 1: its codes are those of the values."""
    x = every_value(dtype)
    x = x[x.abs().float() <= MAX[format]]
    x = torch.nn.functional.pad(x, (0, -len(x) % (BLOCK - 1))).reshape(-1, BLOCK - 1)
    largest = torch.full((len(x), 1), MAX[format], dtype=x.dtype)
    x = torch.cat([x, largest], dim=1)
    q, scale = executor(x, format)
    assert (scale == 1).all()
    assert np.array_equal(q.view(torch.uint8).numpy(), integer_round(x.float().numpy(), format))


@executors.of(moekern.per_token_cast_to_fp8)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("format", DTYPES)
def test_every_value_with_its_own_scale(executor: executors.Executor, format: str, dtype: str) -> None:
    """One value a row: s = max(|x|, 1e-4) / max, q = rne(x * (1 / s)), in numpy's f32."""
    x = every_value(dtype).unsqueeze(1)
    q, scale = executor(x, format)
    values = x.float().numpy()
    expected = np.maximum(np.abs(values), np.float32(1e-4)) / np.float32(MAX[format])
    assert np.array_equal(scale.numpy(), expected)
    with np.errstate(over="ignore"):
        assert np.array_equal(q.view(torch.uint8).numpy(), integer_round(values * (np.float32(1) / expected), format))


@executors.of(moekern.per_token_cast_to_fp8, moekern.per_channel_cast_to_fp8)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("format", DTYPES)
def test_every_value_beside_a_larger_one(executor: executors.Executor, format: str, dtype: str) -> None:
    """Blocks with scales of all kinds: powers of two, long fractions, the least and the largest."""
    blocks = []
    for largest in (1.75, 1.0, 1.9921875, 0.3, 3e-5, 60000.0, 3e38):
        amax = torch.tensor(largest).to(FLOATS[dtype])
        x = every_value(dtype)
        x = x[x.abs() <= amax]
        if amax.isfinite():
            x = torch.nn.functional.pad(x, (0, -len(x) % (BLOCK - 1))).reshape(-1, BLOCK - 1)
            blocks.append(torch.cat([x, amax.expand(len(x), 1)], dim=1))
    x = torch.cat(blocks)
    amax = np.maximum(x.float().abs().amax(dim=1, keepdim=True).numpy(), np.float32(1e-4))
    y = x.float().numpy() * (np.float32(1) / (amax / np.float32(MAX[format])))
    if executor.op is moekern.per_channel_cast_to_fp8:
        q, scale = executor(x.t().contiguous(), format)
        q, scale = q.t(), scale.t()
    else:
        q, scale = executor(x, format)
    assert np.array_equal(scale.numpy(), amax / np.float32(MAX[format]))
    assert np.array_equal(q.view(torch.uint8).numpy(), integer_round(y, format))


LARGE = 4 << 20  # bytes of an output from which on it is written past the caches


@executors.of(
    moekern.per_token_cast_to_fp8,
    moekern.per_block_cast_to_fp8,
    moekern.per_channel_cast_to_fp8,
    moekern.silu_mul_cast_to_fp8,
)
@pytest.mark.parametrize("case", [(1024, 0), (1024, 1), (1000, 0)], ids=str)
def test_a_large_cast_is_its_parts(executor: executors.Executor, case: tuple[int, int]) -> None:
    """Rows that begin cache lines or do not, and fill them or do not: the bits of small casts."""
    (cols, offset), stride = case, 1024
    rows = LARGE // cols + 256
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, cols * (2 if executor.op is moekern.silu_mul_cast_to_fp8 else 1), generator=g).bfloat16()
    parts = [executor(part) for part in x.split(rows // 2 // BLOCK * BLOCK)]
    codes = torch.full((rows * stride + 64,), 0x55, dtype=torch.uint8)[offset:][: rows * stride].view(rows, stride)
    scale = torch.cat([part.scale for part in parts])
    out = ScaledTensor(codes[:, :cols].view(parts[0].data.dtype), torch.zeros_like(scale), parts[0].block)
    executor(x, out=out)
    assert torch.equal(out.scale, scale)
    assert torch.equal(codes[:, :cols], torch.cat([part.data.view(torch.uint8) for part in parts]))
    assert (codes[:, cols:] == 0x55).all(), "wrote outside of out"


@executors.of(moekern.dequantize)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_large_dequantize_is_its_parts(executor: executors.Executor, dtype: str, offset: int) -> None:
    cols, itemsize = 544, FLOATS[dtype].itemsize
    rows = LARGE // cols // itemsize + 256
    codes = torch.randint(0, 127, (rows, cols), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = codes.view(torch.float8_e4m3fn)
    scale = torch.rand(rows, 5, generator=torch.Generator().manual_seed(1))
    half = rows // 2
    parts = []
    for part in (slice(0, half), slice(half, rows)):
        out = torch.zeros(part.stop - part.start, cols, dtype=FLOATS[dtype])
        executor(ScaledTensor(x[part], scale[part], (1, BLOCK)), out)
        parts.append(out)
    whole = torch.zeros(rows * cols + 64, dtype=FLOATS[dtype])[offset:][: rows * cols].view(rows, cols)
    executor(ScaledTensor(x, scale, (1, BLOCK)), whole)
    assert torch.equal(whole, torch.cat(parts))


@executors.of(moekern.dequantize)
@pytest.mark.parametrize("format", DTYPES)
def test_every_code_decodes(executor: executors.Executor, format: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
    theirs = codes.numpy().view(getattr(ml_dtypes, f"float8_{format}")).astype(np.float32)
    out = executor((codes.view(DTYPES[format]), torch.ones(2, 1)))
    assert np.array_equal(out.numpy(), theirs, equal_nan=True)
    finite = np.isfinite(theirs)
    assert np.array_equal(np.signbit(out.numpy())[finite], np.signbit(theirs)[finite])


@pytest.mark.parametrize("format", DTYPES)
def test_round_trip(format: str) -> None:
    """Every finite code comes back from a cast of its own value."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(DTYPES[format]).float()
    codes, values = codes[values.isfinite()], values[values.isfinite()]
    assert torch.equal(round_to_fp8(values, format).view(torch.uint8), codes)


@pytest.mark.parametrize("scale", [torch.float32, torch.float8_e8m0fnu])
def test_e4m3fn_becomes_e4m3fnuz_exactly(scale: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).reshape(2, 128).view(torch.float8_e4m3fn)
    x = ScaledTensor(every, torch.tensor([[0.25], [2.0**-126]]).to(scale))
    y = x.to_e4m3fnuz()
    assert y.format == "e4m3fnuz" and y.scale.dtype == scale and y.block == x.block
    torch.testing.assert_close(y.to_float64(), x.to_float64(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(x.data.view(torch.uint8).flatten(), torch.arange(256, dtype=torch.uint8))  # left as they were


def test_what_is_not_exact_in_e4m3fnuz_is_refused() -> None:
    data = torch.zeros(1, 128).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="2\\^127"):
        ScaledTensor(data, torch.tensor([[2.0**127]])).to_e4m3fnuz()
    with pytest.raises(ValueError, match="e5m2"):
        ScaledTensor(data.to(torch.float8_e5m2), torch.ones(1, 1)).to_e4m3fnuz()
