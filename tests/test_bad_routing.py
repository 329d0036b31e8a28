"""Calls of the routing ops that must be refused: each with a ValueError or TypeError that names the argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import test_bad_input as bad
import torch
from test_bad_input import FP8, fp8, freed, grid

import moekern
from moekern import Permuted, Routing, ScaledTensor

T, E, TOPK, H = 5, 32, 4, 300


def i32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def gate(**changes: Any) -> Any:
    return moekern.moe_gate(**{"logits": torch.zeros(T, E), "topk": TOPK, **changes})


def gate_out(weights: Any = None, ids: Any = None, **changes: Any) -> Any:
    weights = torch.zeros(T, TOPK) if weights is None else weights
    return gate(out=Routing(weights, i32(T, TOPK) if ids is None else ids), **changes)


def grouped(**changes: Any) -> Any:
    return gate(**{"num_expert_group": 4, "topk_group": 2, **changes})


GATE: dict[str, tuple[str, Callable[[], Any]]] = {
    "logits None": ("logits", lambda: gate(logits=None)),
    "logits a list": ("logits", lambda: gate(logits=[[1.0]])),
    "logits int": ("logits", lambda: gate(logits=i32(T, E))),
    "logits double": ("logits", lambda: gate(logits=torch.zeros(T, E, dtype=torch.float64))),
    "logits numpy double": ("logits", lambda: gate(logits=np.zeros((T, E)))),
    "logits FP8": ("logits", lambda: gate(logits=fp8(T, E))),
    "logits 1-D": ("logits", lambda: gate(logits=torch.zeros(E))),
    "logits 3-D": ("logits", lambda: gate(logits=torch.zeros(1, T, E))),
    "logits too wide": ("logits", lambda: gate(logits=torch.zeros(T, 1025))),
    "logits without experts": ("topk", lambda: gate(logits=torch.zeros(T, 0))),
    "logits meta": ("logits", lambda: gate(logits=torch.zeros(T, E, device="meta"))),
    "logits freed": ("logits", lambda: gate(logits=freed(T, E))),
    "logits a negated view": ("logits", lambda: gate(logits=torch._neg_view(torch.zeros(T, E)))),
    "topk 0": ("topk", lambda: gate(topk=0)),
    "topk negative": ("topk", lambda: gate(topk=-1)),
    "topk huge": ("topk", lambda: gate(topk=2**40)),
    "topk more than 32": ("topk", lambda: gate(logits=torch.zeros(T, 64), topk=33)),
    "topk more than the experts": ("topk", lambda: gate(logits=torch.zeros(T, 3))),
    "topk a float": ("topk", lambda: gate(topk=4.0)),
    "topk a bool": ("topk", lambda: gate(topk=True)),
    "topk None": ("topk", lambda: gate(topk=None)),
    "topk more than remain": ("topk", lambda: grouped(topk=17)),
    "topk more than one group": ("topk", lambda: grouped(topk=9, topk_group=1)),
    "scoring unknown": ("scoring", lambda: gate(scoring="sqrtsoftplus")),
    "scoring None": ("scoring", lambda: gate(scoring=None)),
    "scoring a number": ("scoring", lambda: gate(scoring=0)),
    "correction_bias shape": ("correction_bias", lambda: gate(correction_bias=torch.zeros(E + 1))),
    "correction_bias 2-D": ("correction_bias", lambda: gate(correction_bias=torch.zeros(1, E))),
    "correction_bias int": ("correction_bias", lambda: gate(correction_bias=i32(E))),
    "correction_bias a number": ("correction_bias", lambda: gate(correction_bias=0.5)),
    "correction_bias meta": ("correction_bias", lambda: gate(correction_bias=torch.zeros(E, device="meta"))),
    "num_expert_group 0": ("num_expert_group", lambda: gate(num_expert_group=0)),
    "num_expert_group does not divide": ("num_expert_group", lambda: gate(num_expert_group=5)),
    "num_expert_group None": ("num_expert_group", lambda: gate(num_expert_group=None)),
    "num_expert_group huge": ("num_expert_group", lambda: gate(num_expert_group=2**31 - 1)),
    "num_expert_group of one expert with a bias": (
        "num_expert_group",
        lambda: gate(num_expert_group=E, topk_group=8, correction_bias=torch.zeros(E)),
    ),
    "topk_group 0": ("topk_group", lambda: grouped(topk_group=0)),
    "topk_group more than the groups": ("topk_group", lambda: grouped(topk_group=5)),
    "topk_group a float": ("topk_group", lambda: grouped(topk_group=2.0)),
    "renormalize a number": ("renormalize", lambda: gate(renormalize=1)),
    "renormalize None": ("renormalize", lambda: gate(renormalize=None)),
    "routed_scaling_factor None": ("routed_scaling_factor", lambda: gate(routed_scaling_factor=None)),
    "routed_scaling_factor NaN": ("routed_scaling_factor", lambda: gate(routed_scaling_factor=math.nan)),
    "routed_scaling_factor infinite": ("routed_scaling_factor", lambda: gate(routed_scaling_factor=math.inf)),
    "routed_scaling_factor beyond f32": ("routed_scaling_factor", lambda: gate(routed_scaling_factor=1e39)),
    "mask_value another": ("mask_value", lambda: gate(mask_value=-1.0)),
    "mask_value NaN": ("mask_value", lambda: gate(mask_value=math.nan)),
    "mask_value infinite": ("mask_value", lambda: gate(mask_value=math.inf)),
    "mask_value None": ("mask_value", lambda: gate(mask_value=None)),
    "out a tensor": ("out", lambda: gate(out=torch.zeros(T, TOPK))),
    "out of one": ("out", lambda: gate(out=(torch.zeros(T, TOPK),))),
    "out an empty tuple": ("out", lambda: gate(out=())),
    "out of None": ("out", lambda: gate(out=(None, None))),
    "out weights shape": ("out", lambda: gate_out(torch.zeros(T, TOPK + 1))),
    "out weights bf16": ("out", lambda: gate_out(torch.zeros(T, TOPK).bfloat16())),
    "out weights 1-D": ("out", lambda: gate_out(torch.zeros(T * TOPK))),
    "out weights expanded": ("out", lambda: gate_out(torch.zeros(1, TOPK).expand(T, TOPK))),
    "out weights meta": ("out", lambda: gate_out(torch.zeros(T, TOPK, device="meta"))),
    "out weights in logits": ("out", lambda: gate_out((x := torch.zeros(T, E))[:, :TOPK], logits=x)),
    "out ids shape": ("out", lambda: gate_out(ids=i32(T + 1, TOPK))),
    "out ids i64": ("out", lambda: gate_out(ids=torch.zeros(T, TOPK, dtype=torch.int64))),
    "out ids None": ("out", lambda: gate(out=Routing(torch.zeros(T, TOPK), None))),
    "out ids in weights": ("out", lambda: gate_out(x := torch.zeros(T, TOPK), x.view(torch.int32))),
    "out ids in correction_bias": (
        "out",
        lambda: gate_out(ids=(x := torch.zeros(E)).view(torch.int32)[: T * TOPK].view(T, TOPK), correction_bias=x),
    ),
}


def permute(**changes: Any) -> Any:
    return moekern.moe_permute(**{"x": torch.zeros(T, H), "ids": i32(T, TOPK), "num_experts": E, **changes})


def permute_out(moved: Any = None, inverse: Any = None, **changes: Any) -> Any:
    moved = torch.zeros(T * TOPK, H) if moved is None else moved
    return permute(out=Permuted(moved, None, i32(T, TOPK) if inverse is None else inverse), **changes)


def scaled_out(data: Any = None, scale: Any = None, block: Any = (1, 128), **changes: Any) -> Any:
    data = fp8(T * TOPK, H) if data is None else data
    scale = grid(T * TOPK, 3) if scale is None else scale
    return permute_out(ScaledTensor(data, scale, block), **{"x": (fp8(T, H), grid(T, 3)), **changes})


def cast_out(data: Any = None, scale: Any = None, block: Any = (1, 128), **changes: Any) -> Any:
    return scaled_out(data, scale, block, **{"x": torch.zeros(T, H), "format": "e4m3fn", **changes})


PERMUTE: dict[str, tuple[str, Callable[[], Any]]] = {
    "x None": ("x", lambda: permute(x=None)),
    "x int": ("x", lambda: permute(x=i32(T, H))),
    "x double": ("x", lambda: permute(x=torch.zeros(T, H, dtype=torch.float64))),
    "x FP8 without scale": ("x", lambda: permute(x=fp8(T, H))),
    "x float with scale": ("x", lambda: permute(x=(torch.zeros(T, H), grid(T, 3)))),
    "x 1-D": ("x", lambda: permute(x=torch.zeros(T))),
    "x 3-D": ("x", lambda: permute(x=torch.zeros(1, T, H))),
    "x 128x128 scales": ("x", lambda: permute(x=(fp8(T, H), grid(1, 3)))),
    "x scale of two rows": ("x", lambda: permute(x=ScaledTensor(fp8(T, H), grid(3, 3), (2, 128)))),
    "x meta": ("x", lambda: permute(x=torch.zeros(T, H, device="meta"))),
    "x freed": ("x", lambda: permute(x=freed(T, H))),
    "x a negated view": ("x", lambda: permute(x=torch._neg_view(torch.zeros(T, H)))),
    "ids None": ("ids", lambda: permute(ids=None)),
    "ids a list": ("ids", lambda: permute(ids=[[0]])),
    "ids float": ("ids", lambda: permute(ids=torch.zeros(T, TOPK))),
    "ids bool": ("ids", lambda: permute(ids=torch.zeros(T, TOPK, dtype=torch.bool))),
    "ids i16": ("ids", lambda: permute(ids=torch.zeros(T, TOPK, dtype=torch.int16))),
    "ids 1-D": ("ids", lambda: permute(ids=i32(T))),
    "ids other tokens": ("ids", lambda: permute(ids=i32(T + 1, TOPK))),
    "ids meta": ("ids", lambda: permute(ids=i32(T, TOPK).to("meta"))),
    "ids of no expert": ("ids", lambda: permute(ids=torch.full((T, TOPK), E))),
    "ids below -1": ("ids", lambda: permute(ids=torch.full((T, TOPK), -2))),
    "ids huge": ("ids", lambda: permute(ids=torch.full((T, TOPK), 2**62))),
    "ids beyond the map": ("ids", lambda: permute(ids=torch.full((T, TOPK), 7), expert_map=i32(7))),
    "ids without experts": ("ids", lambda: permute(num_experts=0)),
    "num_experts negative": ("num_experts", lambda: permute(num_experts=-1)),
    "num_experts a float": ("num_experts", lambda: permute(num_experts=8.0)),
    "num_experts None": ("num_experts", lambda: permute(num_experts=None)),
    "alignment 0": ("alignment", lambda: permute(alignment=0)),
    "alignment a bool": ("alignment", lambda: permute(alignment=True)),
    "alignment None": ("alignment", lambda: permute(alignment=None)),
    "alignment beyond int32": ("ids", lambda: permute(alignment=2**31 - 1)),
    "expert_map float": ("expert_map", lambda: permute(expert_map=torch.zeros(E))),
    "expert_map 2-D": ("expert_map", lambda: permute(expert_map=i32(1, E))),
    "expert_map a list": ("expert_map", lambda: permute(expert_map=[0, 1])),
    "expert_map of no expert": ("expert_map", lambda: permute(expert_map=torch.full((64,), E))),
    "expert_map below -1": ("expert_map", lambda: permute(expert_map=torch.full((64,), -2))),
    "expert_map meta": ("expert_map", lambda: permute(expert_map=i32(64).to("meta"))),
    "format unknown": ("format", lambda: permute(format="e4m3")),
    "format of no FP8": ("format", lambda: permute(format="bf16")),
    "format a dtype": ("format", lambda: permute(format=torch.float8_e4m3fn)),
    "format of scaled rows": ("format", lambda: permute(x=(fp8(T, H), grid(T, 3)), format="e4m3fn")),
    "round_scale_up without a format": ("round_scale_up", lambda: permute(round_scale_up=True)),
    "round_scale_up a number": ("round_scale_up", lambda: permute(format="e4m3fn", round_scale_up=1)),
    "out a tensor": ("out", lambda: permute(out=torch.zeros(T * TOPK, H))),
    "out a pair": ("out", lambda: permute(out=(torch.zeros(T * TOPK, H), i32(T, TOPK)))),
    "out of None": ("out", lambda: permute(out=Permuted(None, None, None))),
    "out x too few rows": ("out", lambda: permute_out(torch.zeros(T * TOPK - 1, H))),
    "out x width": ("out", lambda: permute_out(torch.zeros(T * TOPK, H + 1))),
    "out x dtype": ("out", lambda: permute_out(torch.zeros(T * TOPK, H).half())),
    "out x FP8": ("out", lambda: permute_out(fp8(T * TOPK, H))),
    "out x scaled": ("out", lambda: permute_out(ScaledTensor(fp8(T * TOPK, H), grid(T * TOPK, 3)))),
    "out x expanded": ("out", lambda: permute_out(torch.zeros(1, H).expand(T * TOPK, H))),
    "out x not contiguous": ("out", lambda: permute_out(torch.zeros(H, T * TOPK).T)),
    "out x meta": ("out", lambda: permute_out(torch.zeros(T * TOPK, H, device="meta"))),
    "out x overlaps x": ("out", lambda: permute_out(y := torch.zeros(T * TOPK, H), x=y[:T])),
    "out inverse shape": ("out", lambda: permute_out(inverse=i32(T, TOPK + 1))),
    "out inverse i64": ("out", lambda: permute_out(inverse=torch.zeros(T, TOPK, dtype=torch.int64))),
    "out inverse None": ("out", lambda: permute(out=Permuted(torch.zeros(T * TOPK, H), None, None))),
    "out inverse expanded": ("out", lambda: permute_out(inverse=i32(1, TOPK).expand(T, TOPK))),
    "out inverse is ids": ("out", lambda: permute_out(inverse=(i := i32(T, TOPK)), ids=i)),
    "out without scales": ("out", lambda: scaled_out(x=torch.zeros(T, H))),
    "out with scales of another block": ("out", lambda: scaled_out(scale=grid(T * TOPK, 1), block=(1, H))),
    "out with scales of two rows": ("out", lambda: scaled_out(scale=grid(T * TOPK // 2, 3), block=(2, 128))),
    "out with ue8m0 scales": ("out", lambda: scaled_out(scale=grid(T * TOPK, 3).to(torch.float8_e8m0fnu))),
    "out of another format": ("out", lambda: scaled_out(data=fp8(T * TOPK, H).view(torch.float8_e5m2))),
    "out of a cast without scales": ("out", lambda: permute_out(fp8(T * TOPK, H), format="e4m3fn")),
    "out of a cast of floats": ("out", lambda: permute_out(format="e4m3fn")),
    "out of a cast in another format": ("out", lambda: cast_out(format="e5m2")),
    "out of a cast in other blocks": ("out", lambda: cast_out(scale=grid(T * TOPK, 1), block=(1, H))),
    "out of a cast in blocks of two rows": ("out", lambda: cast_out(scale=grid(T * TOPK // 2, 3), block=(2, 128))),
    "out of a cast with ue8m0 scales": ("out", lambda: cast_out(scale=grid(T * TOPK, 3).to(torch.float8_e8m0fnu))),
    "out of a cast whose scales are in x": (
        "out",
        lambda: cast_out(scale=(x := torch.zeros(T * TOPK, H))[:, :3], x=x[:T]),
    ),
    "out scale expanded": ("out", lambda: scaled_out(scale=grid(1, 3).expand(T * TOPK, 3))),
    "out scale in x.scale": (
        "out",
        lambda: scaled_out(scale=(s := grid(T * TOPK, 3)), x=ScaledTensor(fp8(T, H), s[:T], (1, 128))),
    ),
}

R = 9


def unpermute(**changes: Any) -> Any:
    arguments = {"y": torch.zeros(R, H), "inverse": i32(T, TOPK), "weights": torch.zeros(T, TOPK), **changes}
    return moekern.moe_unpermute(**arguments)


UNPERMUTE: dict[str, tuple[str, Callable[[], Any]]] = {
    "y None": ("y", lambda: unpermute(y=None)),
    "y int": ("y", lambda: unpermute(y=i32(R, H))),
    "y FP8": ("y", lambda: unpermute(y=fp8(R, H))),
    "y scaled": ("y", lambda: unpermute(y=ScaledTensor(fp8(R, H), grid(R, 3)))),
    "y 1-D": ("y", lambda: unpermute(y=torch.zeros(H))),
    "y meta": ("y", lambda: unpermute(y=torch.zeros(R, H, device="meta"))),
    "y freed": ("y", lambda: unpermute(y=freed(R, H))),
    "y without rows": ("inverse", lambda: unpermute(y=torch.zeros(0, H))),
    "inverse None": ("inverse", lambda: unpermute(inverse=None)),
    "inverse float": ("inverse", lambda: unpermute(inverse=torch.zeros(T, TOPK))),
    "inverse 1-D": ("inverse", lambda: unpermute(inverse=i32(T))),
    "inverse of no row": ("inverse", lambda: unpermute(inverse=torch.full((T, TOPK), R))),
    "inverse below -1": ("inverse", lambda: unpermute(inverse=torch.full((T, TOPK), -2))),
    "inverse meta": ("inverse", lambda: unpermute(inverse=i32(T, TOPK).to("meta"))),
    "weights shape": ("weights", lambda: unpermute(weights=torch.zeros(T, TOPK + 1))),
    "weights 1-D": ("weights", lambda: unpermute(weights=torch.zeros(T))),
    "weights int": ("weights", lambda: unpermute(weights=i32(T, TOPK))),
    "weights double": ("weights", lambda: unpermute(weights=torch.zeros(T, TOPK, dtype=torch.float64))),
    "weights a negated view": ("weights", lambda: unpermute(weights=torch._neg_view(torch.zeros(T, TOPK)))),
    "out shape": ("out", lambda: unpermute(out=torch.zeros(T + 1, H))),
    "out int": ("out", lambda: unpermute(out=i32(T, H))),
    "out FP8": ("out", lambda: unpermute(out=fp8(T, H))),
    "out a number": ("out", lambda: unpermute(out=0)),
    "out expanded": ("out", lambda: unpermute(out=torch.zeros(1, H).expand(T, H))),
    "out not contiguous": ("out", lambda: unpermute(out=torch.zeros(H, T).T)),
    "out meta": ("out", lambda: unpermute(out=torch.zeros(T, H, device="meta"))),
    "out in y": ("out", lambda: unpermute(y=(y := torch.zeros(R, H)), out=y[:T])),
    "out against out_dtype": ("out", lambda: unpermute(out=torch.zeros(T, H), out_dtype=torch.bfloat16)),
    "out_dtype FP8": ("out_dtype", lambda: unpermute(out_dtype=FP8)),
    "out_dtype a string": ("out_dtype", lambda: unpermute(out_dtype="bf16")),
}


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        pytest.param(argument, call, id=f"{op}: {name}")
        for op, rows in (("gate", GATE), ("permute", PERMUTE), ("unpermute", UNPERMUTE))
        for name, (argument, call) in rows.items()
    ],
)
def test_refused_with_the_argument_named(argument: str, call: Callable[[], Any]) -> None:
    bad.test_refused_with_the_argument_named(argument, call)


def test_the_place_of_a_wrong_id_is_named() -> None:
    ids = i32(T, TOPK)
    ids[3, 1] = E
    with pytest.raises(ValueError, match=rf"moe_permute: ids\[3, 1\] is {E}; it must be from 0 to {E - 1}, or -1"):
        permute(ids=ids)
    with pytest.raises(ValueError, match=r"moe_unpermute: inverse\[3, 1\] is 32; it must be from 0 to 8, or -1"):
        unpermute(inverse=ids)


def test_array_inputs() -> None:
    """numpy arrays are read as they are."""
    logits = torch.randn(T, E)
    routing = moekern.moe_gate(logits.numpy(), TOPK)
    assert torch.equal(routing.ids, moekern.moe_gate(logits, TOPK).ids)
    x = torch.randn(T, H)
    moved = moekern.moe_permute(x.numpy(), routing.ids.numpy(), E)
    back = moekern.moe_unpermute(moved.x.numpy(), moved.inverse.numpy(), routing.weights.numpy())
    assert torch.equal(back, moekern.moe_unpermute(moved.x, moved.inverse, routing.weights))
