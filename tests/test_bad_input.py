"""Calls that must be refused: each with a ValueError or TypeError that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import moekern
from moekern import ScaledTensor
from moekern.ops import OPS

M, N, K = 5, 200, 300
FP8 = torch.float8_e4m3fn


def fp8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8).view(FP8)


def grid(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


def weights() -> ScaledTensor:
    return ScaledTensor(fp8(N, K), grid(2, 3))


def gemm(**changes: Any) -> Any:
    return moekern.fp8_gemm_nt(**{"a": torch.zeros(M, K), "b": weights(), **changes})


def overlapping() -> tuple[torch.Tensor, torch.Tensor]:
    buffer = torch.zeros(M * K + M * N)
    return buffer[: M * K].view(M, K), buffer[M * K - 1 : M * K - 1 + M * N].view(M, N)


def freed(*shape: int) -> torch.Tensor:
    x = torch.zeros(shape)
    x.untyped_storage().resize_(0)
    return x


def gemm_into_its_operand(name: str) -> Any:
    x, out = overlapping()
    if name == "a":
        return gemm(a=x, out=out)
    if name == "c":
        buffer = torch.zeros(M * N + 1)
        return gemm(c=buffer[1:].view(M, N), out=buffer[:-1].view(M, N))
    if name == "bias":
        return gemm(bias=out.view(-1)[:N], out=out)
    if name == "b.scale":
        return gemm(b=ScaledTensor(fp8(N, K), out.view(-1)[:6].view(2, 3)), out=out)
    return gemm(b=ScaledTensor(out.view(FP8)[:, :K], grid(1, 3)), out=out)


GEMM: dict[str, tuple[str, Callable[[], Any]]] = {
    "a None": ("a", lambda: gemm(a=None)),
    "a a number": ("a", lambda: gemm(a=1.0)),
    "a a string": ("a", lambda: gemm(a="activations")),
    "a an empty tuple": ("a", lambda: gemm(a=())),
    "a a triple": ("a", lambda: gemm(a=(fp8(M, K), grid(M, 3), 1, 2))),
    "a a list of numbers": ("a", lambda: gemm(a=[1, 2])),
    "a FP8 without scale": ("a", lambda: gemm(a=fp8(M, K))),
    "a float with scale": ("a", lambda: gemm(a=(torch.zeros(M, K), grid(M, 3)))),
    "a int": ("a", lambda: gemm(a=torch.zeros(M, K, dtype=torch.int32))),
    "a bool": ("a", lambda: gemm(a=torch.zeros(M, K, dtype=torch.bool))),
    "a double": ("a", lambda: gemm(a=torch.zeros(M, K, dtype=torch.float64))),
    "a complex": ("a", lambda: gemm(a=torch.zeros(M, K, dtype=torch.complex64))),
    "a ue8m0": ("a", lambda: gemm(a=torch.zeros(M, K, dtype=torch.uint8).view(torch.float8_e8m0fnu))),
    "a numpy double": ("a", lambda: gemm(a=np.zeros((M, K)))),
    "a numpy strings": ("a", lambda: gemm(a=np.array([["x"]]))),
    "a scalar": ("a", lambda: gemm(a=torch.zeros(()))),
    "a 1-D": ("a", lambda: gemm(a=torch.zeros(K))),
    "a 3-D": ("a", lambda: gemm(a=torch.zeros(1, M, K))),
    "a other k": ("a", lambda: gemm(a=torch.zeros(M, K + 1))),
    "a meta": ("a", lambda: gemm(a=torch.zeros(M, K, device="meta"))),
    "a sparse": ("a", lambda: gemm(a=torch.zeros(M, K).to_sparse())),
    "a freed": ("a", lambda: gemm(a=freed(M, K))),
    "a negated view": ("a", lambda: gemm(a=torch._neg_view(torch.zeros(M, K)))),
    "a scale grid": ("a", lambda: gemm(a=(fp8(M, K), grid(M, 4)))),
    "a scale 3-D": ("a", lambda: gemm(a=(fp8(M, K), grid(1, M, 3)))),
    "a scale int": ("a", lambda: gemm(a=(fp8(M, K), torch.ones(M, 3, dtype=torch.int32)))),
    "a scale bf16": ("a", lambda: gemm(a=(fp8(M, K), grid(M, 3).bfloat16()))),
    "a scale None": ("a", lambda: gemm(a=(fp8(M, K), None))),
    "a scale meta": ("a", lambda: gemm(a=(fp8(M, K), grid(M, 3).to("meta")))),
    "a data 3-D": ("a", lambda: gemm(a=(fp8(1, M, K), grid(M, 3)))),
    "b None": ("b", lambda: gemm(b=None)),
    "b a tensor": ("b", lambda: gemm(b=torch.zeros(N, K))),
    "b FP8 without scale": ("b", lambda: gemm(b=fp8(N, K))),
    "b an empty tuple": ("b", lambda: gemm(b=())),
    "b data float": ("b", lambda: gemm(b=(torch.zeros(N, K), grid(2, 3)))),
    "b data uint8": ("b", lambda: gemm(b=(torch.zeros(N, K, dtype=torch.uint8), grid(2, 3)))),
    "b data 1-D": ("b", lambda: gemm(b=(fp8(K), grid(1, 3)))),
    "b other k": ("a", lambda: gemm(b=(fp8(N, K - 1), grid(2, 3)))),
    "b scale grid": ("b", lambda: gemm(b=(fp8(N, K), grid(3, 3)))),
    "b meta": ("b", lambda: gemm(b=(fp8(N, K).to("meta"), grid(2, 3).to("meta")))),
    "c a number": ("c", lambda: gemm(c=1.0)),
    "c shape": ("c", lambda: gemm(c=torch.zeros(N, M))),
    "c 1-D": ("c", lambda: gemm(a=torch.zeros(1, K), c=torch.zeros(N))),
    "c int": ("c", lambda: gemm(c=torch.zeros(M, N, dtype=torch.int32))),
    "c FP8": ("c", lambda: gemm(c=fp8(M, N))),
    "c meta": ("c", lambda: gemm(c=torch.zeros(M, N, device="meta"))),
    "bias shape": ("bias", lambda: gemm(bias=torch.zeros(N + 1))),
    "bias 2-D": ("bias", lambda: gemm(bias=torch.zeros(1, N))),
    "bias a column": ("bias", lambda: gemm(bias=torch.zeros(N, 1))),
    "bias scalar": ("bias", lambda: gemm(b=(fp8(1, K), grid(1, 3)), bias=torch.zeros(()))),
    "bias int": ("bias", lambda: gemm(bias=torch.zeros(N, dtype=torch.int64))),
    "bias meta": ("bias", lambda: gemm(bias=torch.zeros(N, device="meta"))),
    "out shape": ("out", lambda: gemm(out=torch.zeros(M, N + 1))),
    "out transposed shape": ("out", lambda: gemm(out=torch.zeros(N, M))),
    "out 1-D": ("out", lambda: gemm(a=torch.zeros(1, K), out=torch.zeros(N))),
    "out 3-D": ("out", lambda: gemm(out=torch.zeros(1, M, N))),
    "out int": ("out", lambda: gemm(out=torch.zeros(M, N, dtype=torch.int32))),
    "out FP8": ("out", lambda: gemm(out=fp8(M, N))),
    "out double": ("out", lambda: gemm(out=torch.zeros(M, N, dtype=torch.float64))),
    "out numpy": ("out", lambda: gemm(out=np.zeros((M, N), np.float32))),
    "out a number": ("out", lambda: gemm(out=0)),
    "out meta": ("out", lambda: gemm(out=torch.zeros(M, N, device="meta"))),
    "out freed": ("out", lambda: gemm(out=freed(M, N))),
    "out expanded rows": ("out", lambda: gemm(out=torch.zeros(1, N).expand(M, N))),
    "out expanded columns": ("out", lambda: gemm(out=torch.zeros(M, 1).expand(M, N))),
    "out one expanded column": ("out", lambda: gemm(b=(fp8(1, K), grid(1, 3)), out=torch.zeros(1, 1).expand(M, 1))),
    "out rows that overlap": ("out", lambda: gemm(out=torch.zeros(M * N).as_strided((M, N), (N - 1, 1)))),
    "out columns that overlap": ("out", lambda: gemm(out=torch.zeros(M * N).as_strided((M, N), (1, M - 1)))),
    "out against out_dtype": ("out", lambda: gemm(out=torch.zeros(M, N), out_dtype=torch.bfloat16)),
    "out_dtype FP8": ("out_dtype", lambda: gemm(out_dtype=FP8)),
    "out_dtype int": ("out_dtype", lambda: gemm(out_dtype=torch.int32)),
    "out_dtype a string": ("out_dtype", lambda: gemm(out_dtype="bf16")),
    "out_dtype a list": ("out_dtype", lambda: gemm(out_dtype=[])),
    **{
        f"out overlaps {name}": ("out", lambda name=name: gemm_into_its_operand(name))
        for name in ("a", "b", "b.scale", "bias", "c")
    },
}


def scaled(data: Any, scale: Any, block: Any = (0, 0)) -> Any:
    return ScaledTensor(data, scale, block)


SCALED: dict[str, tuple[str, Callable[[], Any]]] = {
    "data None": ("data", lambda: scaled(None, grid(2, 3))),
    "data float": ("data", lambda: scaled(torch.zeros(N, K), grid(2, 3))),
    "data 1-D": ("data", lambda: scaled(fp8(K), grid(1))),
    "data 4-D": ("data", lambda: scaled(fp8(1, 1, N, K), grid(1, 1, 2, 3))),
    "scale of one matrix for a stack": ("scale", lambda: scaled(fp8(4, N, K), grid(2, 3))),
    "scale of another stack": ("scale", lambda: scaled(fp8(4, N, K), grid(3, 2, 3))),
    "scale of a scalar for a stack": ("scale", lambda: scaled(fp8(4, N, K), grid())),
    "scale None": ("scale", lambda: scaled(fp8(N, K), None)),
    "scale int": ("scale", lambda: scaled(fp8(N, K), torch.ones(2, 3, dtype=torch.int32))),
    "scale 3-D": ("scale", lambda: scaled(fp8(N, K), grid(1, 2, 3), (128, 128))),
    "scale fits no block": ("scale", lambda: scaled(fp8(N, K), grid(5, 7))),
    "scale fits not this block": ("scale", lambda: scaled(fp8(N, K), grid(2, 3), (64, 128))),
    "block negative": ("block", lambda: scaled(fp8(N, K), grid(2, 3), (-128, 128))),
    "block half zero": ("block", lambda: scaled(fp8(N, K), grid(2, 3), (128, 0))),
    "block of one": ("block", lambda: scaled(fp8(N, K), grid(2, 3), (128,))),
    "block a number": ("block", lambda: scaled(fp8(N, K), grid(2, 3), 128)),
    "block of floats": ("block", lambda: scaled(fp8(N, K), grid(2, 3), (128.0, 128.0))),
    "block of strings": ("block", lambda: scaled(fp8(N, K), grid(2, 3), ("128", "128"))),
    "block None": ("block", lambda: scaled(fp8(N, K), grid(2, 3), (None, 128))),
}


def cast(**changes: Any) -> Any:
    return moekern.per_token_cast_to_fp8(**{"x": torch.zeros(M, K), **changes})


def cast_out(**changes: Any) -> Any:
    fields = {"data": fp8(M, K), "scale": grid(M, 3), "block": (1, 128), **changes}
    return cast(out=ScaledTensor(**fields))


CAST: dict[str, tuple[str, Callable[[], Any]]] = {
    "x None": ("x", lambda: cast(x=None)),
    "x a list": ("x", lambda: cast(x=[[1.0]])),
    "x int": ("x", lambda: cast(x=torch.zeros(M, K, dtype=torch.int32))),
    "x double": ("x", lambda: cast(x=torch.zeros(M, K, dtype=torch.float64))),
    "x FP8": ("x", lambda: cast(x=fp8(M, K))),
    "x 1-D": ("x", lambda: cast(x=torch.zeros(K))),
    "x 3-D": ("x", lambda: cast(x=torch.zeros(1, M, K))),
    "x meta": ("x", lambda: cast(x=torch.zeros(M, K, device="meta"))),
    "x freed": ("x", lambda: cast(x=freed(M, K))),
    "x odd for gate and up": ("x", lambda: moekern.silu_mul_cast_to_fp8(torch.zeros(M, 3))),
    "format unknown": ("format", lambda: cast(format="fp8")),
    "format None": ("format", lambda: cast(format=None)),
    "format a dtype": ("format", lambda: cast(format=FP8)),
    "format ue8m0": ("format", lambda: cast(format="ue8m0")),
    "format against out": ("format", lambda: cast(format="e5m2", out=ScaledTensor(fp8(M, K), grid(M, 3)))),
    "round_scale_up a string": ("round_scale_up", lambda: cast(round_scale_up="yes")),
    "round_scale_up None": ("round_scale_up", lambda: cast(round_scale_up=None)),
    "out a tensor": ("out", lambda: cast(out=fp8(M, K))),
    "out a number": ("out", lambda: cast(out=1)),
    "out an empty tuple": ("out", lambda: cast(out=())),
    "out shape": ("out", lambda: cast_out(data=fp8(M + 1, K), scale=grid(M + 1, 3))),
    "out block": ("out", lambda: cast_out(scale=grid(1, 3), block=(128, 128))),
    "out ue8m0 scale": ("out", lambda: cast_out(scale=torch.zeros(M, 3, dtype=torch.uint8).view(torch.float8_e8m0fnu))),
    "out expanded": ("out", lambda: cast_out(data=fp8(1, K).expand(M, K))),
    "out not contiguous": ("out", lambda: cast_out(data=fp8(K, M).T)),
    "out scale expanded": ("out", lambda: cast_out(scale=grid(1, 3).expand(M, 3))),
    "out scale one column expanded": (
        "out",
        lambda: moekern.per_token_cast_to_fp8(
            torch.zeros(M, 8), out=ScaledTensor(fp8(M, 8), grid(1, 1).expand(M, 1), (1, 128))
        ),
    ),
    "out meta": ("out", lambda: cast_out(data=fp8(M, K).to("meta"), scale=grid(M, 3).to("meta"))),
    "out overlaps x": (
        "out",
        lambda: cast(x=(x := torch.zeros(M, K)), out=ScaledTensor(x.view(FP8)[:, :K], grid(M, 3), (1, 128))),
    ),
    "out scale overlaps x": (
        "out",
        lambda: cast(x=(x := torch.zeros(M, K)), out=ScaledTensor(fp8(M, K), x[:, :3], (1, 128))),
    ),
}

DEQUANTIZE: dict[str, tuple[str, Callable[[], Any]]] = {
    "x None": ("x", lambda: moekern.dequantize(None)),
    "x a tensor": ("x", lambda: moekern.dequantize(torch.zeros(2, 2))),
    "x an empty tuple": ("x", lambda: moekern.dequantize(())),
    "x scale grid": ("x", lambda: moekern.dequantize((fp8(N, K), grid(9, 9)))),
    "x meta": ("x", lambda: moekern.dequantize((fp8(N, K).to("meta"), grid(2, 3).to("meta")))),
    "out shape": ("out", lambda: moekern.dequantize(weights(), torch.zeros(N, K + 1))),
    "out FP8": ("out", lambda: moekern.dequantize(weights(), fp8(N, K))),
    "out expanded": ("out", lambda: moekern.dequantize(weights(), torch.zeros(1, K).expand(N, K))),
    "out against out_dtype": ("out", lambda: moekern.dequantize(weights(), torch.zeros(N, K), torch.bfloat16)),
    "out_dtype int": ("out_dtype", lambda: moekern.dequantize(weights(), out_dtype=torch.int8)),
    "out overlaps x": (
        "out",
        lambda: moekern.dequantize(ScaledTensor((x := torch.zeros(N, K)).view(FP8)[:, :K], grid(2, 3)), x),
    ),
}

TABLE = [
    pytest.param(argument, call, id=f"{op}: {name}")
    for op, rows in (("gemm", GEMM), ("ScaledTensor", SCALED), ("cast", CAST), ("dequantize", DEQUANTIZE))
    for name, (argument, call) in rows.items()
]


@pytest.mark.parametrize(("argument", "call"), TABLE)
def test_refused_with_the_argument_named(argument: str, call: Callable[[], Any]) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    before, _, rest = str(caught.value).partition(": ")
    said = rest if before in {op.name for op in OPS} else str(caught.value)
    assert said.replace(".", " ").split()[0] == argument, (
        f"the message does not begin with {argument!r}: {caught.value}"
    )


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_unknown_keyword(op: moekern.Op) -> None:
    with pytest.raises(TypeError, match="nonsense"):
        op(torch.zeros(1, 1), nonsense=1)


def test_column_slices_of_one_buffer_do_not_overlap() -> None:
    """a, c and out side by side in one workspace: their extents interleave, their elements do not."""
    workspace = torch.randn(M, K + 2 * N)
    a, c, out = workspace[:, :K], workspace[:, K : K + N], workspace[:, K + N :]
    expected = moekern.fp8_gemm_nt(a.clone(), weights(), c.clone())
    assert torch.equal(moekern.fp8_gemm_nt(a, weights(), c, out=out), expected)


def test_array_inputs() -> None:
    """numpy arrays, and ml_dtypes' bfloat16 and FP8, are read as they are."""
    import ml_dtypes

    g = torch.Generator().manual_seed(0)
    a, w = torch.randn(M, K, generator=g), torch.randn(N, K, generator=g)
    q, s = moekern.per_block_cast_to_fp8(w)
    expected = moekern.fp8_gemm_nt(a, (q, s))
    data = q.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    assert torch.equal(moekern.fp8_gemm_nt(a.numpy(), (data, s.numpy())), expected)
    half = a.numpy().astype(ml_dtypes.bfloat16)
    assert torch.equal(moekern.fp8_gemm_nt(half, (data, s.numpy())), moekern.fp8_gemm_nt(a.bfloat16(), (q, s)))
    for ours, theirs in zip(moekern.per_block_cast_to_fp8(w.numpy()), (q, s), strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
