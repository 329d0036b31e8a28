"""Small modules of moekern's ops for export."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.onnx._internal.exporter import _registration

import moekern
from moekern import ExpertWeights, GroupedLayout, ScaledTensor

# Every export would translate all of onnxscript's functions for torch's operators anew: a fifth of its time.
_functions = _registration.onnxscript_apis
_functions.get_torchlib_ops = functools.cache(_functions.get_torchlib_ops)

TOKENS = ({0: torch.export.Dim("tokens", min=1, max=4096)},)
H, I, E, K = 200, 96, 6, 2  # hidden, intermediate, experts, experts a token


def weights(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 [G, N, K] and its scales."""
    cast = [moekern.per_block_cast_to_fp8(torch.randn(shape[1:]) / shape[-1] ** 0.5) for _ in range(shape[0])]
    return torch.stack([c.data for c in cast]), torch.stack([c.scale for c in cast])


class Linear(nn.Module):
    def __init__(
        self, quantized: bool = False, scale_fmt: bool = False, n: int = 160, k: int = 200, out: Any = torch.float32
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        weight = moekern.per_block_cast_to_fp8(torch.randn(n, k))
        self.weight, self.scale = nn.Parameter(weight.data, requires_grad=False), nn.Parameter(weight.scale)
        self.bias, self.quantized, self.round_up, self.out = nn.Parameter(torch.randn(n)), quantized, scale_fmt, out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        a = moekern.per_token_cast_to_fp8(rows, round_scale_up=self.round_up) if self.quantized else rows
        y = moekern.fp8_gemm_nt(a, (self.weight, self.scale), bias=self.bias, out_dtype=self.out)
        return y.unflatten(0, x.shape[:-1])


class Experts(nn.Module):
    """A layer whose experts are described by `describe(self)`."""

    def __init__(
        self, describe: Callable[..., ExpertWeights], shared: bool = False, gate: Any = None, **options: Any
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, shape in (("w13", (E, 2 * I, H)), ("w2", (E, H, I)), ("s13", (1, 2 * I, H)), ("s2", (1, H, I))):
            data, scale = weights(*shape)
            self.register_buffer(name, data)
            self.register_buffer(f"{name}_scale", scale)
        self.register_buffer("b13", torch.randn(E, 2 * I))
        self.register_buffer("b2", torch.randn(E, H))
        self.router = nn.Parameter(torch.randn(E, H) / H**0.5)
        self.describe, self.shared, self.options = describe, shared, options
        self.gate = {"renormalize": True} if gate is None else gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared = ExpertWeights((self.s13, self.s13_scale), (self.s2, self.s2_scale)) if self.shared else None
        routing = moekern.moe_gate(x.float() @ self.router.T.float(), K, **self.gate)
        return moekern.fused_experts(
            x, self.describe(self), routing.ids, routing.weights, shared=shared, **self.options
        )


def stacked(m: Any) -> ExpertWeights:
    return ExpertWeights((m.w13, m.w13_scale), (m.w2, m.w2_scale))


def listed(m: Any) -> ExpertWeights:
    """A matrix for every expert, gate and up apart."""
    pairs = [ScaledTensor(m.w13[e], m.w13_scale[e], (128, 128)) for e in range(E)]
    halves = [[ScaledTensor(p.data[h * I : h * I + I], p.scale[h : h + 1], (128, 128)) for p in pairs] for h in (0, 1)]
    return ExpertWeights.separate(*halves, [ScaledTensor(m.w2[e], m.w2_scale[e], (128, 128)) for e in range(E)])


def two_grids(m: Any) -> ExpertWeights:
    return ExpertWeights((m.w13, m.w13_scale), (m.w2, m.w2_scale), split_scales=True)


def gpt_oss(m: Any) -> ExpertWeights:
    return ExpertWeights((m.w13, m.w13_scale), (m.w2, m.w2_scale), b13=m.b13, b2=m.b2, interleaved=True)


class Grouped(nn.Module):
    """permute, a grouped product, unpermute: W8A16, or W8A8 with a cast "before" the first or "within" it."""

    def __init__(self, cast: str | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        data, scale = weights(E, H, H)
        self.register_buffer("weight", data)
        self.register_buffer("scale", scale)
        self.cast = cast

    def forward(self, x: torch.Tensor, ids: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        rows = moekern.per_token_cast_to_fp8(x) if self.cast == "before" else x
        format = "e4m3fn" if self.cast == "within" else None
        moved, layout, inverse = moekern.moe_permute(rows, ids, E, alignment=4, format=format)
        y = moekern.m_grouped_fp8_gemm_nt_contiguous(moved, (self.weight, self.scale), layout, out_dtype=torch.float32)
        return moekern.moe_unpermute(y, inverse, factors)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrices = nn.ParameterList(nn.Parameter(w, requires_grad=False) for w in weights(E, 40, H)[0])
        self.scale = nn.Parameter(torch.rand(E, 1, 2) + 0.5)

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        pairs = [ScaledTensor(w, self.scale[g], (128, 128)) for g, w in enumerate(self.matrices)]
        layout = GroupedLayout.from_masked(counts, x.shape[1])
        y = moekern.m_grouped_fp8_gemm_nt_masked(x, pairs, layout)
        return torch.where(torch.arange(x.shape[1]).unsqueeze(1) < counts.view(-1, 1, 1), y, 0.0)


class Gradients(nn.Module):
    """A weight gradient of every group, in FP8."""

    def forward(self, a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        layout = GroupedLayout.from_ends(ends, rows=a.shape[0])
        cast = moekern.per_channel_cast_to_fp8(a), moekern.per_channel_cast_to_fp8(b)
        return moekern.k_grouped_fp8_gemm_tn_contiguous(*cast, layout)


class Casts(nn.Module):
    """Every cast and back."""

    def __init__(self, format: str = "e4m3fn", round_scale_up: bool = False) -> None:
        super().__init__()
        self.format, self.round_scale_up = format, round_scale_up

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        casts = (
            moekern.per_token_cast_to_fp8,
            moekern.per_block_cast_to_fp8,
            moekern.per_channel_cast_to_fp8,
            moekern.silu_mul_cast_to_fp8,
        )
        return tuple(moekern.dequantize(cast(x, self.format, self.round_scale_up)) for cast in casts)
