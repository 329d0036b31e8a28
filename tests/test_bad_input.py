"""Calls that must be refused: each with a ValueError or TypeError that names the argument."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import moekern
from moekern import GroupedLayout, ScaledTensor
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

G, CAPACITY = 3, 4  # groups of 2, 0 and 3 rows


def fp8_stack(count: int = G, rows: int = N, columns: int = K) -> ScaledTensor:
    return ScaledTensor(fp8(count, rows, columns), grid(count, -(-rows // 128), -(-columns // 128)))


def rows_layout() -> GroupedLayout:
    return GroupedLayout.from_counts([2, 0, 3])


def m_grouped(**changes: Any) -> Any:
    arguments = {"a": torch.zeros(M, K), "b": fp8_stack(), "layout": rows_layout(), **changes}
    return moekern.m_grouped_fp8_gemm_nt_contiguous(**arguments)


def fake_weights() -> moekern.GroupedWeights:
    with FakeTensorMode() as mode:
        return moekern.GroupedWeights([(mode.from_tensor(fp8(N, K)), mode.from_tensor(grid(2, 3))) for _ in range(G)])


def written(index: int, value: int, of: str = "counts") -> GroupedLayout:
    """A layout that somebody wrote to, behind the constructor's back."""
    layout = rows_layout()
    getattr(layout, of)[index] = value
    return layout


def into_its_operand(name: str) -> Any:
    """out begins at the last byte of an operand."""
    buffer = torch.zeros(G * N * K, dtype=torch.uint8)
    if name == "a":
        a = buffer[: M * K * 4].view(torch.float32).view(M, K)
        return m_grouped(a=a, out=buffer[M * K * 4 - 4 :][: M * N * 4].view(torch.float32).view(M, N))
    out = buffer[-M * N * 4 :].view(torch.float32).view(M, N)
    data = buffer[: G * N * K].view(FP8).view(G, N, K)
    scale = grid(G, 2, 3)
    if name == "b.scale":
        scale = out.view(-1)[: G * 6].view(G, 2, 3)
        data = fp8(G, N, K)
    if name == "a matrix of b":
        return m_grouped(b=[(fp8(N, K), grid(2, 3)), (fp8(N, K), grid(2, 3)), (data[2], scale[2])], out=out)
    return m_grouped(b=(data, scale), out=out)


M_GROUPED: dict[str, tuple[str, Callable[[], Any]]] = {
    "a None": ("a", lambda: m_grouped(a=None)),
    "a FP8 without scale": ("a", lambda: m_grouped(a=fp8(M, K))),
    "a int": ("a", lambda: m_grouped(a=torch.zeros(M, K, dtype=torch.int64))),
    "a 3-D": ("a", lambda: m_grouped(a=torch.zeros(1, M, K))),
    "a a stack": ("a", lambda: m_grouped(a=ScaledTensor(fp8(1, M, K), grid(1, M, 3)))),
    "a other k": ("a", lambda: m_grouped(a=torch.zeros(M, K + 1))),
    "a other rows than the layout": ("a", lambda: m_grouped(a=torch.zeros(M + 1, K))),
    "a meta": ("a", lambda: m_grouped(a=torch.zeros(M, K, device="meta"))),
    "a negated view": ("a", lambda: m_grouped(a=torch._neg_view(torch.zeros(M, K)))),
    "a scale grid": ("a", lambda: m_grouped(a=(fp8(M, K), grid(M, 4)))),
    "b None": ("b", lambda: m_grouped(b=None)),
    "b a tensor": ("b", lambda: m_grouped(b=torch.zeros(G, N, K))),
    "b one matrix": ("b", lambda: m_grouped(b=weights())),
    "b an empty list": ("b", lambda: m_grouped(b=[])),
    "b a list of tensors": ("b", lambda: m_grouped(b=[fp8(N, K)] * G)),
    "b a list of numbers": ("b", lambda: m_grouped(b=[1, 2, 3])),
    "b a list of stacks": ("b", lambda: m_grouped(b=[fp8_stack()] * G)),
    "b a list with a float matrix": ("b", lambda: m_grouped(b=[weights(), (torch.zeros(N, K), grid(2, 3)), weights()])),
    "b matrices of two shapes": ("b", lambda: m_grouped(b=[weights(), weights(), fp8_stack(1, N - 1).group(0)])),
    "b matrices of two formats": (
        "b",
        lambda: m_grouped(b=[weights(), weights(), ScaledTensor(fp8(N, K).view(torch.float8_e5m2), grid(2, 3))]),
    ),
    "b matrices of two blocks": ("b", lambda: m_grouped(b=[weights(), weights(), ScaledTensor(fp8(N, K), grid(N, 3))])),
    "b matrices of two strides": (
        "b",
        lambda: m_grouped(b=[weights(), weights(), ScaledTensor(fp8(K, N).T, grid(2, 3))]),
    ),
    "b matrices of two scale dtypes": (
        "b",
        lambda: m_grouped(b=[weights(), weights(), ScaledTensor(fp8(N, K), grid(2, 3).to(torch.float8_e8m0fnu))]),
    ),
    "b a meta matrix": (
        "b",
        lambda: m_grouped(b=[weights(), weights(), (fp8(N, K).to("meta"), grid(2, 3).to("meta"))]),
    ),
    "b fake matrices with a plain a": ("b", lambda: m_grouped(b=fake_weights())),
    "b other groups than the layout": ("b", lambda: m_grouped(b=fp8_stack(G + 1))),
    "b a list of other groups": ("b", lambda: m_grouped(b=[weights()] * (G - 1))),
    "b meta": ("b", lambda: m_grouped(b=(fp8(G, N, K).to("meta"), grid(G, 2, 3).to("meta")))),
    "layout None": ("layout", lambda: m_grouped(layout=None)),
    "layout DeepGEMM's indices": ("layout", lambda: m_grouped(layout=rows_layout().indices())),
    "layout masked": ("layout", lambda: m_grouped(layout=GroupedLayout.from_masked([2, 0, 3], CAPACITY))),
    "layout counts written": ("layout", lambda: m_grouped(layout=written(2, 4))),
    "layout counts written huge": ("layout", lambda: m_grouped(layout=written(2, 2**62))),
    "layout counts written negative": ("layout", lambda: m_grouped(layout=written(0, -1))),
    "layout starts written": ("layout", lambda: m_grouped(layout=written(2, -5, "starts"))),
    "layout starts written to overlap": ("layout", lambda: m_grouped(layout=written(2, 1, "starts"))),
    "layout against a block of scales": (
        "layout",
        lambda: m_grouped(a=ScaledTensor(fp8(M, K), grid(2, 3), (4, 128))),
    ),
    "out shape": ("out", lambda: m_grouped(out=torch.zeros(M, N + 1))),
    "out 3-D": ("out", lambda: m_grouped(out=torch.zeros(1, M, N))),
    "out int": ("out", lambda: m_grouped(out=torch.zeros(M, N, dtype=torch.int32))),
    "out a number": ("out", lambda: m_grouped(out=0)),
    "out meta": ("out", lambda: m_grouped(out=torch.zeros(M, N, device="meta"))),
    "out negated view": ("out", lambda: m_grouped(out=torch._neg_view(torch.zeros(M, N)))),
    "out expanded": ("out", lambda: m_grouped(out=torch.zeros(1, N).expand(M, N))),
    "out against out_dtype": ("out", lambda: m_grouped(out=torch.zeros(M, N), out_dtype=torch.bfloat16)),
    "out_dtype FP8": ("out_dtype", lambda: m_grouped(out_dtype=FP8)),
    **{
        f"out overlaps {name}": ("out", lambda name=name: into_its_operand(name))
        for name in ("a", "b", "b.scale", "a matrix of b")
    },
}


def masked(**changes: Any) -> Any:
    layout = GroupedLayout.from_masked([2, 0, 3], CAPACITY)
    arguments = {"a": torch.zeros(G, CAPACITY, K), "b": fp8_stack(), "layout": layout, **changes}
    return moekern.m_grouped_fp8_gemm_nt_masked(**arguments)


MASKED: dict[str, tuple[str, Callable[[], Any]]] = {
    "a 2-D": ("a", lambda: masked(a=torch.zeros(G * CAPACITY, K))),
    "a one FP8 matrix": ("a", lambda: masked(a=ScaledTensor(fp8(M, K), grid(M, 3)))),
    "a FP8 without scale": ("a", lambda: masked(a=fp8(G, CAPACITY, K))),
    "a of another capacity": ("a", lambda: masked(a=torch.zeros(G, CAPACITY + 1, K))),
    "a of other groups": ("a", lambda: masked(a=torch.zeros(G + 1, CAPACITY, K))),
    "a other k": ("a", lambda: masked(a=torch.zeros(G, CAPACITY, K - 1))),
    "b other groups than the layout": ("b", lambda: masked(b=fp8_stack(G - 1))),
    "layout contiguous": ("layout", lambda: masked(layout=rows_layout())),
    "layout DeepGEMM's masked_m": ("layout", lambda: masked(layout=torch.tensor([2, 0, 3]))),
    "out 2-D": ("out", lambda: masked(out=torch.zeros(G * CAPACITY, N))),
    "out shape": ("out", lambda: masked(out=torch.zeros(G, CAPACITY, N - 1))),
    "out other groups": ("out", lambda: masked(out=torch.zeros(G - 1, CAPACITY, N))),
    "out one group for all": ("out", lambda: masked(out=torch.zeros(1, CAPACITY, N).expand(G, CAPACITY, N))),
    "out groups that overlap": (
        "out",
        lambda: masked(out=torch.zeros(G * CAPACITY * N).as_strided((G, CAPACITY, N), (N, N, 1))),
    ),
    "out overlaps a": (
        "out",
        lambda: masked(a=(x := torch.zeros(G, CAPACITY, K)), out=x.view(-1)[: G * CAPACITY * N].view(G, CAPACITY, N)),
    ),
}


def k_grouped(**changes: Any) -> Any:
    arguments = {
        "a": ScaledTensor(fp8(300, M), grid(3, M)),
        "b": ScaledTensor(fp8(300, N), grid(3, N)),
        "layout": GroupedLayout.from_counts([128, 0, 40], rows=300),
        **changes,
    }
    return moekern.k_grouped_fp8_gemm_tn_contiguous(**arguments)


K_GROUPED: dict[str, tuple[str, Callable[[], Any]]] = {
    "a None": ("a", lambda: k_grouped(a=None)),
    "a FP8 without scale": ("a", lambda: k_grouped(a=fp8(300, M))),
    "a other rows than the layout": ("a", lambda: k_grouped(a=torch.zeros(299, M))),
    "a 3-D": ("a", lambda: k_grouped(a=torch.zeros(1, 300, M))),
    "b float": ("b", lambda: k_grouped(b=torch.zeros(300, N))),
    "b a stack": ("b", lambda: k_grouped(b=ScaledTensor(fp8(1, 300, N), grid(1, 3, N)))),
    "b other rows than the layout": ("b", lambda: k_grouped(b=ScaledTensor(fp8(301, N), grid(3, N)))),
    "layout a list of ks": ("layout", lambda: k_grouped(layout=[128, 0, 40])),
    "layout masked": ("layout", lambda: k_grouped(layout=GroupedLayout.from_masked([128, 0, 40], 100 + 28))),
    "layout that starts within a block of scales": (
        "layout",
        lambda: k_grouped(layout=GroupedLayout.from_counts([100, 0, 40], rows=300)),
    ),
    "layout counts written": (
        "layout",
        lambda: k_grouped(layout=(x := GroupedLayout.from_counts([128, 172]), x.counts.fill_(300))[0]),
    ),
    "c a number": ("c", lambda: k_grouped(c=0.0)),
    "c 2-D": ("c", lambda: k_grouped(c=torch.zeros(M, N))),
    "c shape": ("c", lambda: k_grouped(c=torch.zeros(G, N, M))),
    "c int": ("c", lambda: k_grouped(c=torch.zeros(G, M, N, dtype=torch.int32))),
    "c negated view": ("c", lambda: k_grouped(c=torch._neg_view(torch.zeros(G, M, N)))),
    "out shape": ("out", lambda: k_grouped(out=torch.zeros(G + 1, M, N))),
    "out 2-D": ("out", lambda: k_grouped(out=torch.zeros(M, N))),
    "out FP8": ("out", lambda: k_grouped(out=fp8(G, M, N))),
    "out one matrix for all": ("out", lambda: k_grouped(out=torch.zeros(1, M, N).expand(G, M, N))),
    "out against out_dtype": ("out", lambda: k_grouped(out=torch.zeros(G, M, N), out_dtype=torch.float16)),
    "out overlaps c": (
        "out",
        lambda: k_grouped(c=(x := torch.zeros(G * M * N + 1))[1:].view(G, M, N), out=x[:-1].view(G, M, N)),
    ),
    "out overlaps a": (
        "out",
        lambda: k_grouped(
            a=(x := torch.zeros(300, M)), out=x.view(-1)[: M * G].view(G, M, 1), b=ScaledTensor(fp8(300, 1), grid(3, 1))
        ),
    ),
    "out overlaps b": (
        "out",
        lambda: k_grouped(
            b=ScaledTensor((x := torch.zeros(300, N // 4)).view(FP8), grid(3, N)),
            out=x.view(-1)[: G * N].view(G, 1, N),
            a=torch.zeros(300, 1),
        ),
    ),
    "out_dtype int": ("out_dtype", lambda: k_grouped(out_dtype=torch.int8)),
}

GROUPED_WEIGHTS: dict[str, tuple[str, Callable[[], Any]]] = {
    "groups None": ("groups", lambda: moekern.GroupedWeights(None)),
    "groups a stack": ("groups", lambda: moekern.GroupedWeights(fp8_stack())),
    "groups empty": ("groups", lambda: moekern.GroupedWeights([])),
    "groups a tensor in it": ("groups", lambda: moekern.GroupedWeights([weights(), fp8(N, K)])),
    "groups two shapes": ("groups", lambda: moekern.GroupedWeights([weights(), fp8_stack(1, N + 1).group(0)])),
}

TABLE = [
    pytest.param(argument, call, id=f"{op}: {name}")
    for op, rows in (
        ("gemm", GEMM),
        ("m_grouped", M_GROUPED),
        ("masked", MASKED),
        ("k_grouped", K_GROUPED),
        ("GroupedWeights", GROUPED_WEIGHTS),
        ("ScaledTensor", SCALED),
        ("cast", CAST),
        ("dequantize", DEQUANTIZE),
    )
    for name, (argument, call) in rows.items()
]


NAMES = {"GroupedWeights", "ExpertWeights", "batched_experts"}  # with which messages begin, beside the ops


@pytest.mark.parametrize(("argument", "call"), TABLE)
def test_refused_with_the_argument_named(argument: str, call: Callable[[], Any]) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    before, _, rest = str(caught.value).partition(": ")
    said = rest if before in {op.name for op in OPS} | NAMES else str(caught.value)
    assert re.split(r"[ .\[]", said)[0] == argument, f"the message does not begin with {argument!r}: {caught.value}"


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
