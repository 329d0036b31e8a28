"""Experts and calls of fused_experts that must be refused, naming the argument: test_bad_input.py's table goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_bad_input
import torch
from test_bad_input import FP8, fp8, freed, grid

import moekern
from moekern import ExpertWeights, GroupedLayout, ScaledTensor

E, T, K, H, I = 4, 5, 2, 150, 72


def weights(**changes: Any) -> ExpertWeights:
    arguments = {"w13": (fp8(E, 2 * I, H), grid(E, 2, 2)), "w2": (fp8(E, H, I), grid(E, 2, 1)), **changes}
    return ExpertWeights(**arguments)


def separate(**changes: Any) -> ExpertWeights:
    matrices = {name: [(fp8(I, H), grid(1, 2))] * E for name in ("gate", "up")}
    return ExpertWeights.separate(**{**matrices, "down": [(fp8(H, I), grid(2, 1))] * E, **changes})


def one_of_four(matrix: Any, other: Any) -> list[Any]:
    return [matrix, matrix, other, matrix]


def without_storage(x: torch.Tensor) -> torch.Tensor:
    x.untyped_storage().resize_(0)
    return x


UP = (fp8(I, H), grid(1, 2))
WEIGHTS: dict[str, tuple[str, Callable[[], Any]]] = {
    "w13 None": ("w13", lambda: weights(w13=None)),
    "w13 a tensor": ("w13", lambda: weights(w13=torch.zeros(E, 2 * I, H, dtype=torch.bfloat16))),
    "w13 FP8 without scale": ("w13", lambda: weights(w13=fp8(E, 2 * I, H))),
    "w13 float": ("w13", lambda: weights(w13=(torch.zeros(E, 2 * I, H), grid(E, 2, 2)))),
    "w13 empty": ("w13", lambda: weights(w13=[])),
    "w13 no experts": ("w13", lambda: weights(w13=(fp8(0, 2 * I, H), grid(0, 2, 2)))),
    "w13 one matrix": ("w13", lambda: weights(w13=(fp8(2 * I, H), grid(2, 2)))),
    "w13 4-D": ("w13", lambda: weights(w13=(fp8(1, E, 2 * I, H), grid(1, E, 2, 2)))),
    "w13 a list of tensors": ("w13", lambda: weights(w13=[fp8(2 * I, H)] * E)),
    "w13 a list of floats": ("w13", lambda: weights(w13=[(torch.zeros(2 * I, H), grid(2, 2))] * E)),
    "w13 a list of stacks": ("w13", lambda: weights(w13=[(fp8(E, 2 * I, H), grid(E, 2, 2))] * E)),
    "w13 odd rows": ("w13", lambda: weights(w13=(fp8(E, 2 * I - 1, H), grid(E, 2, 2)))),
    "w13 no rows": ("w13", lambda: weights(w13=(fp8(E, 0, H), grid(E, 0, 2)))),
    "w13 no columns": ("w13", lambda: weights(w13=(fp8(E, 2 * I, 0), grid(E, 2, 0)))),
    "w13 scale grid": ("w13", lambda: weights(w13=(fp8(E, 2 * I, H), grid(E, 3, 2)))),
    "w13 scale of other experts": ("w13", lambda: weights(w13=(fp8(E, 2 * I, H), grid(E + 1, 2, 2)))),
    "w13 scale int": ("w13", lambda: weights(w13=(fp8(E, 2 * I, H), torch.ones(E, 2, 2, dtype=torch.int32)))),
    "w13 scale None": ("w13", lambda: weights(w13=(fp8(E, 2 * I, H), None))),
    "w13 meta": ("w13", lambda: weights(w13=(fp8(E, 2 * I, H).to("meta"), grid(E, 2, 2).to("meta")))),
    "w13 scale meta": ("w13", lambda: weights(w13=(fp8(E, 2 * I, H), grid(E, 2, 2).to("meta")))),
    "w13 freed": ("w13", lambda: weights(w13=(without_storage(fp8(E, 2 * I, H)), grid(E, 2, 2)))),
    "w13 scale freed": ("w13", lambda: weights(w13=(fp8(E, 2 * I, H), freed(E, 2, 2)))),
    "w13 one of another shape": (
        "w13",
        lambda: weights(w13=one_of_four((fp8(2 * I, H), grid(2, 2)), (fp8(2 * I + 2, H), grid(2, 2)))),
    ),
    "w13 one of another block": (
        "w13",
        lambda: weights(w13=one_of_four((fp8(2 * I, H), grid(2, 2)), (fp8(2 * I, H), grid(2 * I, 2)))),
    ),
    "w13 one of another format": (
        "w13",
        lambda: weights(
            w13=one_of_four((fp8(2 * I, H), grid(2, 2)), (fp8(2 * I, H).view(torch.float8_e5m2), grid(2, 2)))
        ),
    ),
    "w13 one of another scale dtype": (
        "w13",
        lambda: weights(
            w13=one_of_four((fp8(2 * I, H), grid(2, 2)), (fp8(2 * I, H), grid(2, 2).to(torch.float8_e8m0fnu)))
        ),
    ),
    "w13 interleaved in blocks of odd rows": (
        "w13",
        lambda: weights(w13=ScaledTensor(fp8(E, 2 * I, H), grid(E, 48, 2), (3, 128)), interleaved=True),
    ),
    "w13 split without halves": ("w13", lambda: weights(w13=(fp8(E, 2 * I, H), grid(E, 3, 2)), split_scales=True)),
    "w13 split of no known block": ("w13", lambda: weights(w13=(fp8(E, 2 * I, H), grid(E, 4, 2)), split_scales=True)),
    "w13 split ScaledTensor": (
        "w13",
        lambda: weights(w13=ScaledTensor(fp8(E, 2 * I, H), grid(E, 2, 2)), split_scales=True),
    ),
    "split_scales interleaved": ("split_scales", lambda: weights(split_scales=True, interleaved=True)),
    "w2 other experts": ("w2", lambda: weights(w2=(fp8(E + 1, H, I), grid(E + 1, 2, 1)))),
    "w2 other rows": ("w2", lambda: weights(w2=(fp8(E, H + 1, I), grid(E, 2, 1)))),
    "w2 transposed": ("w2", lambda: weights(w2=(fp8(E, I, H), grid(E, 1, 2)))),
    "w2 float": ("w2", lambda: weights(w2=(torch.zeros(E, H, I), grid(E, 2, 1)))),
    "b13 a number": ("b13", lambda: weights(b13=1.0)),
    "b13 shape": ("b13", lambda: weights(b13=torch.zeros(E, I))),
    "b13 a vector": ("b13", lambda: weights(b13=torch.zeros(2 * I))),
    "b13 too few": ("b13", lambda: weights(b13=[torch.zeros(2 * I)] * (E - 1))),
    "b13 int": ("w13", lambda: weights(b13=torch.zeros(E, 2 * I, dtype=torch.int32))),
    "b2 shape": ("b2", lambda: weights(b2=torch.zeros(E, H + 1))),
    "b2 double": ("w2", lambda: weights(b2=torch.zeros(E, H, dtype=torch.float64))),
    "gate a tensor": ("gate", lambda: separate(gate=fp8(E, I, H))),
    "gate bf16": ("gate", lambda: separate(gate=[(torch.zeros(I, H, dtype=torch.bfloat16), grid(1, 2))] * E)),
    "up other rows": ("up", lambda: separate(up=[(fp8(I + 1, H), grid(1, 2))] * E)),
    "up other experts": ("up", lambda: separate(up=[UP] * (E - 1))),
    "up another format than gate": ("up", lambda: separate(up=[(UP[0].view(torch.float8_e5m2), UP[1])] * E)),
    "up another block than gate": ("up", lambda: separate(up=[(fp8(I, H), grid(I, 2))] * E)),
    "down None": ("down", lambda: separate(down=None)),
    "down other columns": ("down", lambda: separate(down=[(fp8(H, I + 1), grid(2, 1))] * E)),
}


def call(**changes: Any) -> Any:
    arguments = {
        "x": torch.zeros(T, H),
        "experts": weights(),
        "ids": torch.zeros(T, K, dtype=torch.int64),
        "weights": torch.ones(T, K),
        **changes,
    }
    return moekern.fused_experts(**arguments)


def ids_with(value: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    ids = torch.zeros(T, K, dtype=dtype)
    ids[3, 1] = value
    return ids


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def bytes_(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.uint8)


def into(name: str) -> Any:
    """out, or the workspace, begins at the last byte of an operand."""
    buffer = bytes_(1 << 16)
    x = buffer[: T * H * 4].view(torch.float32).view(T, H)
    after = buffer[T * H * 4 - 4 :]
    if name == "workspace":
        return call(x=x, workspace=after)
    out = after[: T * H * 4].view(torch.float32).view(T, H)
    if name == "x":
        return call(x=x, out=out)
    if name == "ids":
        return call(ids=after[: T * K * 8 + 4][4:].view(torch.int64).view(T, K), out=out)
    if name == "weights":
        return call(weights=after[: T * K * 4].view(torch.float32).view(T, K), out=out)
    return call(out=out, workspace=after)


CALLS: dict[str, tuple[str, Callable[[], Any]]] = {
    "x None": ("x", lambda: call(x=None)),
    "x int": ("x", lambda: call(x=torch.zeros(T, H, dtype=torch.int32))),
    "x double": ("x", lambda: call(x=torch.zeros(T, H, dtype=torch.float64))),
    "x FP8 without scale": ("x", lambda: call(x=fp8(T, H))),
    "x float with scale": ("x", lambda: call(x=(torch.zeros(T, H), grid(T, 2)))),
    "x block": ("x", lambda: call(x=ScaledTensor(fp8(T, H), grid(T, 1), (1, H)))),
    "x 1-D": ("x", lambda: call(x=torch.zeros(H))),
    "x 3-D": ("x", lambda: call(x=torch.zeros(1, T, H))),
    "x columns": ("x", lambda: call(x=torch.zeros(T, H + 1))),
    "x meta": ("x", lambda: call(x=torch.zeros(T, H, device="meta"))),
    "x freed": ("x", lambda: call(x=freed(T, H))),
    "x a negated view": ("x", lambda: call(x=torch._neg_view(torch.zeros(T, H)))),
    "experts None": ("experts", lambda: call(experts=None)),
    "experts a stack": ("experts", lambda: call(experts=(fp8(E, 2 * I, H), grid(E, 2, 2)))),
    "ids None": ("ids", lambda: call(ids=None)),
    "ids a list": ("ids", lambda: call(ids=[[0, 1]] * T)),
    "ids float": ("ids", lambda: call(ids=torch.zeros(T, K))),
    "ids int16": ("ids", lambda: call(ids=torch.zeros(T, K, dtype=torch.int16))),
    "ids bytes": ("ids", lambda: call(ids=torch.zeros(T, K, dtype=torch.uint8))),
    "ids rows": ("ids", lambda: call(ids=torch.zeros(T + 1, K, dtype=torch.int64))),
    "ids 1-D": ("ids", lambda: call(ids=torch.zeros(T, dtype=torch.int64))),
    "ids too large": ("ids", lambda: call(ids=ids_with(E))),
    "ids far too large": ("ids", lambda: call(ids=ids_with(1 << 40))),
    "ids too large in 32 bits": ("ids", lambda: call(ids=ids_with(2**31 - 1, torch.int32))),
    "ids below -1": ("ids", lambda: call(ids=ids_with(-2))),
    "ids too large for the map": ("ids", lambda: call(ids=ids_with(6), expert_map=integers(0, 1, 2, 3, -1, -1))),
    "ids meta": ("ids", lambda: call(ids=ids_with(0).to("meta"))),
    "weights a number": ("weights", lambda: call(weights=1.0)),
    "weights bf16": ("weights", lambda: call(weights=torch.ones(T, K, dtype=torch.bfloat16))),
    "weights double": ("weights", lambda: call(weights=torch.ones(T, K, dtype=torch.float64))),
    "weights shape": ("weights", lambda: call(weights=torch.ones(T, K + 1))),
    "weights 1-D": ("weights", lambda: call(weights=torch.ones(T))),
    "weights a negated view": ("weights", lambda: call(weights=torch._neg_view(torch.ones(T, K)))),
    "activation unknown": ("activation", lambda: call(activation="relu")),
    "activation None": ("activation", lambda: call(activation=None)),
    "activation a function": ("activation", lambda: call(activation=torch.nn.functional.silu)),
    "alpha a string": ("alpha", lambda: call(alpha="1")),
    "alpha infinite": ("alpha", lambda: call(alpha=float("inf"))),
    "alpha for gelu": ("alpha", lambda: call(activation="gelu", alpha=1.702)),
    "beta NaN": ("beta", lambda: call(beta=float("nan"))),
    "beta for gelu": ("beta", lambda: call(activation="gelu_tanh", beta=1.0)),
    "limit zero": ("limit", lambda: call(limit=0.0)),
    "limit negative": ("limit", lambda: call(limit=-7)),
    "limit a tensor": ("limit", lambda: call(limit=torch.tensor(7.0))),
    "quantize_activations a string": ("quantize_activations", lambda: call(quantize_activations="yes")),
    "apply_router_weight_on_input None": (
        "apply_router_weight_on_input",
        lambda: call(apply_router_weight_on_input=None),
    ),
    "reduce a number": ("reduce", lambda: call(reduce=1)),
    "expert_map float": ("expert_map", lambda: call(expert_map=torch.zeros(8))),
    "expert_map 2-D": ("expert_map", lambda: call(expert_map=torch.zeros(1, 8, dtype=torch.int64))),
    "expert_map too large": ("expert_map", lambda: call(expert_map=integers(0, E))),
    "expert_map below -1": ("expert_map", lambda: call(expert_map=integers(0, -2))),
    "shared a stack": ("shared", lambda: call(shared=(fp8(E, 2 * I, H), grid(E, 2, 2)))),
    "shared other columns": (
        "shared",
        lambda: call(shared=ExpertWeights((fp8(1, 2 * I, H + 1), grid(1, 2, 2)), (fp8(1, H + 1, I), grid(1, 2, 1)))),
    ),
    "shared without a sum": ("shared", lambda: call(shared=weights(), reduce=False)),
    "out shape": ("out", lambda: call(out=torch.zeros(T, H + 1))),
    "out rows": ("out", lambda: call(out=torch.zeros(T, H), reduce=False)),
    "out 3-D": ("out", lambda: call(out=torch.zeros(T, K, H), reduce=False)),
    "out int": ("out", lambda: call(out=torch.zeros(T, H, dtype=torch.int32))),
    "out FP8": ("out", lambda: call(out=fp8(T, H))),
    "out expanded": ("out", lambda: call(out=torch.zeros(1, H).expand(T, H))),
    "out against out_dtype": ("out", lambda: call(out=torch.zeros(T, H), out_dtype=torch.bfloat16)),
    "out meta": ("out", lambda: call(out=torch.zeros(T, H, device="meta"))),
    "out_dtype FP8": ("out_dtype", lambda: call(out_dtype=FP8)),
    "workspace float": ("workspace", lambda: call(workspace=torch.zeros(1 << 20))),
    "workspace 2-D": ("workspace", lambda: call(workspace=torch.zeros(1, 1 << 20, dtype=torch.uint8))),
    "workspace with gaps": ("workspace", lambda: call(workspace=bytes_(1 << 20)[::2])),
    "workspace too small": ("workspace", lambda: call(workspace=bytes_(8))),
    "workspace empty": ("workspace", lambda: call(workspace=bytes_(0))),
    "workspace a number": ("workspace", lambda: call(workspace=1 << 20)),
    **{f"out overlaps {name}": ("out", lambda name=name: into(name)) for name in ("x", "ids", "weights")},
    "workspace overlaps x": ("workspace", lambda: into("workspace")),
    "workspace overlaps out": ("workspace", lambda: into("out")),
}


def batched(**changes: Any) -> Any:
    arguments = {"x": torch.zeros(E, 3, H), "experts": weights(), "counts": integers(1, 2, 3, 0), **changes}
    return moekern.batched_experts(**arguments)


BATCHED: dict[str, tuple[str, Callable[[], Any]]] = {
    "x 2-D": ("x", lambda: batched(x=torch.zeros(3 * E, H))),
    "x other experts": ("x", lambda: batched(x=torch.zeros(E + 1, 3, H))),
    "x columns": ("x", lambda: batched(x=torch.zeros(E, 3, H + 1))),
    "counts too few": ("counts", lambda: batched(counts=integers(1, 2))),
    "counts float": ("counts", lambda: batched(counts=torch.zeros(E))),
    "counts too large": ("counts", lambda: batched(counts=integers(1, 2, 4, 0))),
    "counts negative": ("counts", lambda: batched(counts=integers(1, 2, -1, 0))),
    "counts of another capacity": ("counts", lambda: batched(counts=GroupedLayout.from_masked([1, 2, 3, 0], 4))),
    "counts of no capacity": ("counts", lambda: batched(counts=GroupedLayout.from_counts([1, 2, 3, 0]))),
    "out shape": ("out", lambda: batched(out=torch.zeros(E, 4, H))),
    "out with gaps": ("out", lambda: batched(out=torch.zeros(E, 4, H)[:, :3])),
}

TABLE = [
    pytest.param(argument, function, id=f"{what}: {name}")
    for what, rows in (("ExpertWeights", WEIGHTS), ("fused_experts", CALLS), ("batched_experts", BATCHED))
    for name, (argument, function) in rows.items()
]


@pytest.mark.parametrize(("argument", "function"), TABLE)
def test_refused_with_the_argument_named(argument: str, function: Callable[[], Any]) -> None:
    test_bad_input.test_refused_with_the_argument_named(argument, function)


def test_what_the_tables_change_is_fine_otherwise() -> None:
    assert call().shape == (T, H) and batched().shape == (E, 3, H) and separate().num_experts == E
    for changes in ({"workspace": bytes_(1 << 20)}, {"weights": None}, {"limit": 7}, {"activation": "silu"}):
        assert call(**changes).shape == (T, H)


def test_the_expert_is_named() -> None:
    with pytest.raises(TypeError, match=r"w13\[2\] has dtype torch.float32"):
        weights(w13=one_of_four((fp8(2 * I, H), grid(2, 2)), (torch.zeros(2 * I, H), grid(2, 2))))
    with pytest.raises(ValueError, match=r"ids\[3, 1\] is 4; it must be from 0 to 3, or -1"):
        call(ids=ids_with(E))
