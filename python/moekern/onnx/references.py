"""The float64 references of ops, called as library.py's operators are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moekern import ops
from moekern.experts import ExpertWeights
from moekern.layout import GroupedLayout
from moekern.ops.gate import Routing
from moekern.ops.quantize import reference_cast
from moekern.scaled import BLOCK, ScaledTensor
from moekern.testing.routing_numerics import check_gate
from moekern.weights import from_lists

Results = list[Any]  # tensors, or None
Pairs = tuple[Results, Results]  # exact results, and what there is instead


def compared(op: str, arguments: dict[str, Any], got: Results, quantise: bool) -> Pairs:
    """got, arguments: None for what nothing depends on. quantise: float activations of products were cast to FP8 first.

    Raises AssertionError where a gate chose other experts than rounding could have made it choose.
    """
    pairs = zip(*_COMPARED[op](arguments, got, quantise), strict=True)
    known = [(exact, instead) for exact, instead in pairs if instead is not None]
    return [exact for exact, _ in known], [instead for _, instead in known]


def _left(a: dict[str, Any], quantise: bool) -> torch.Tensor | ScaledTensor:
    if a["sa"] is not None:
        return ScaledTensor(a["a"], a["sa"], tuple(a["block_a"]))
    return reference_cast(a["a"], (1, BLOCK), "e4m3fn", round_scale_up=False) if quantise else a["a"]


def _gemm(a: dict[str, Any], got: Results, quantise: bool) -> Pairs:
    right = ScaledTensor(a["b"], a["sb"], tuple(a["block_b"]))
    return [ops.fp8_gemm_nt.reference(_left(a, quantise), right, c=a["c"], bias=a["bias"])], got


def _m_grouped(op: Any) -> Callable[..., Pairs]:
    def compare(a: dict[str, Any], got: Results, quantise: bool) -> Pairs:
        rows = a["a"].shape[:-1].numel()
        layout = GroupedLayout(a["starts"], a["counts"], rows, capacity=a["capacity"])
        right = from_lists(a["b"], a["sb"], a["block_b"], op.name)
        exact = op.reference(_left(a, quantise), right, layout)
        owned = (layout.indices() >= 0).view(*exact.shape[:-1], 1)
        return [exact], [torch.where(owned, got[0].double(), 0.0)]

    return compare


def _k_grouped(a: dict[str, Any], got: Results, quantise: bool) -> Pairs:
    layout = GroupedLayout(a["starts"], a["counts"], len(a["a"]))
    right = ScaledTensor(a["b"], a["sb"], tuple(a["block_b"]))
    return [ops.k_grouped_fp8_gemm_tn_contiguous.reference(_left(a, False), right, layout, a["c"])], got


def _cast(op: Any, block: tuple[int, int]) -> Callable[..., Pairs]:
    def compare(a: dict[str, Any], got: Results, quantise: bool) -> Pairs:
        exact = op.reference(a["x"], a["format"], a["round_scale_up"])
        return [exact.to_float64()], [ScaledTensor(got[0], got[1], block).to_float64()]

    return compare


def _dequantize(a: dict[str, Any], got: Results, quantise: bool) -> Pairs:
    return [ScaledTensor(a["data"], a["scale"], tuple(a["block"])).to_float64()], got


def _gate(a: dict[str, Any], got: Results, quantise: bool) -> Pairs:
    if any(x is None for x in got):
        return [], []
    logits, topk = a.pop("logits"), a.pop("topk")
    check_gate(Routing(*got), logits, topk, **a)
    exact = ops.moe_gate.reference(logits, topk, **a)
    alike = exact.ids == got[1]
    return [exact.weights.where(alike, 0.0)], [got[0].double().where(alike, 0.0)]


def _permute(a: dict[str, Any], got: Results, quantise: bool) -> Pairs:
    rows = a["x"] if a["scale"] is None else ScaledTensor(a["x"], a["scale"], tuple(a["block"]))
    exact, layout, inverse = ops.moe_permute.reference(
        rows, a["ids"], a["num_experts"], alignment=a["alignment"], expert_map=a["expert_map"], format=a["format"],
        round_scale_up=a["round_scale_up"],
    )  # fmt: skip
    moved = got[0]
    if isinstance(exact, ScaledTensor):
        moved, exact = ScaledTensor(got[0], got[1], exact.block).to_float64(), exact.to_float64()
    used = inverse[inverse >= 0].long()
    return [exact[used], layout.starts, layout.counts, inverse], [moved[used], *got[2:]]


def _unpermute(a: dict[str, Any], got: Results, quantise: bool) -> Pairs:
    return [ops.moe_unpermute.reference(a["y"], a["inverse"], a["weights"])], got


def _experts(a: dict[str, Any], got: Results, quantise: bool) -> Pairs:
    x, sx, block = (a.pop(name) for name in ("x", "sx", "block_x"))
    experts, shared = (
        ExpertWeights.from_tensors(tensors, layout) if tensors else None
        for tensors, layout in ((a.pop("experts"), a.pop("layout")), (a.pop("shared"), a.pop("shared_layout")))
    )
    ids, weights, _ = a.pop("ids"), a.pop("weights"), a.pop("out_dtype")
    a["quantize_activations"] = a["quantize_activations"] or quantise
    rows = x if sx is None else ScaledTensor(x, sx, tuple(block))
    return [ops.fused_experts.reference(rows, experts, ids, weights, shared=shared, **a)], got


_COMPARED: dict[str, Callable[..., Pairs]] = {
    "fp8_gemm_nt": _gemm,
    "m_grouped_fp8_gemm_nt_contiguous": _m_grouped(ops.m_grouped_fp8_gemm_nt_contiguous),
    "m_grouped_fp8_gemm_nt_masked": _m_grouped(ops.m_grouped_fp8_gemm_nt_masked),
    "k_grouped_fp8_gemm_tn_contiguous": _k_grouped,
    "per_token_cast_to_fp8": _cast(ops.per_token_cast_to_fp8, (1, BLOCK)),
    "per_block_cast_to_fp8": _cast(ops.per_block_cast_to_fp8, (BLOCK, BLOCK)),
    "per_channel_cast_to_fp8": _cast(ops.per_channel_cast_to_fp8, (BLOCK, 1)),
    "silu_mul_cast_to_fp8": _cast(ops.silu_mul_cast_to_fp8, (1, BLOCK)),
    "dequantize": _dequantize,
    "moe_gate": _gate,
    "moe_permute": _permute,
    "moe_unpermute": _unpermute,
    "fused_experts": _experts,
}
