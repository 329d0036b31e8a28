"""The routing of Mixture-of-Experts layers: `python bench/run.py --op routing`. What moves, against the copy rate."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import report
import torch
from peers.routing import FRESH, RoutingPeer
from rich.console import Console
from timing import compete, machine
from timing.compete import Effort, Row
from timing.problems import Problem, WrongResult, nbytes
from timing.stock import PAGE, Stock

import moekern
from moekern import ScaledTensor, moe_gate, moe_permute, moe_unpermute
from moekern.testing.moe_models import LAYERS, MoeLayer, routing
from moekern.testing.routing_numerics import check_gate, check_unpermute, sum_in_order

OPS = (moe_gate, moe_permute, moe_unpermute)
OP_NAMES = [op.name for op in OPS]
TOKENS, QUICK_TOKENS = (1, 64, 4096), (4096,)
CHECKED = 64  # tokens whose rows are checked


class Case:
    """One layer with one number of tokens. Operands stay where they are, as the layers before and after keep them."""

    def __init__(self, layer: MoeLayer, tokens: int) -> None:
        self.layer, self.tokens = layer, tokens
        self.logits = [torch.randn(tokens, layer.experts) for _ in range(FRESH)]
        self.bias = torch.randn(layer.experts) * 0.05 if layer.correction_bias else None
        drawn = [routing(tokens, layer.experts, layer.top_k, 0.0, layer.scaling, seed) for seed in range(FRESH)]
        self.ids = [ids.int() for ids, _ in drawn]
        self.weights = [weights for _, weights in drawn]
        self.x = torch.randn(tokens, layer.hidden).bfloat16()
        self.moved = torch.zeros(tokens * layer.top_k, layer.hidden, dtype=torch.bfloat16)
        self.y = torch.randn(layer.hidden).bfloat16().expand_as(self.moved).clone()
        self.y[:, 0] = torch.arange(len(self.y)) % 251  # rows that differ
        self.inverse = [moe_permute(self.x[:, :0], ids, layer.experts).inverse for ids in self.ids]
        self.out = torch.zeros_like(self.x)

    def problems(self, op: str, kinds: list[str]) -> list[Problem]:
        if op == "moe_gate":
            return [self.gate()]
        if op == "moe_unpermute":
            return [self.unpermute()]
        return [self.permute(kind) for kind in (*kinds, *(("cast",) if "fp8" in kinds else ()))]

    def gate(self) -> Problem:
        layer = self.layer
        out = moe_gate(self.logits[0], layer.top_k)
        fixed = {
            "topk": layer.top_k,
            "scoring": layer.scoring,
            "correction_bias": self.bias,
            "num_expert_group": layer.groups,
            "topk_group": layer.kept_groups,
            "renormalize": layer.renormalise,
            "routed_scaling_factor": layer.scaling,
            "out": out,
        }
        moved = nbytes(self.logits[0], *out)
        return self._problem(
            moe_gate, "f32", layer.experts, moved, ("logits", self.logits), fixed, _check_gate, _gate_error
        )

    def permute(self, kind: str) -> Problem:
        """Of bf16 rows, of FP8 rows, or with a cast of the first to the second."""
        x: Any = moekern.per_token_cast_to_fp8(self.x) if kind == "fp8" else self.x
        fixed = {"x": x, "num_experts": self.layer.experts, "format": "e4m3fn" if kind == "cast" else None}
        fixed["out"] = out = moe_permute(ids=self.ids[0], **fixed)
        moved = nbytes(x, out.x, self.ids[0], out.inverse)
        turns = ("ids", self.ids)
        return self._problem(
            moe_permute, kind, self.layer.hidden, moved, turns, fixed, _check_permute, self._permute_error
        )

    def unpermute(self) -> Problem:
        fixed = {"y": self.y, "weights": self.weights[0], "out": self.out}
        moved = nbytes(self.y, self.out, self.inverse[0], self.weights[0])
        turns = ("inverse", self.inverse)
        return self._problem(
            moe_unpermute, "bf16", self.layer.hidden, moved, turns, fixed, _check_unpermute, self._unpermute_error
        )

    def _problem(
        self,
        op: moekern.Op,
        kind: str,
        columns: int,
        moved: int,
        turns: tuple[str, list[Any]],
        fixed: dict[str, Any],
        check: Callable[[Any, dict[str, Any]], None],
        error: Callable[[Any, dict[str, Any]], float],
    ) -> Problem:
        name, values = turns
        turn = itertools.cycle(values)
        shape = {"m": self.tokens, "n": columns, "k": self.layer.top_k}
        example = {name: values[0], **fixed}
        return Problem(op, shape, kind, 0, moved, "copy", example, lambda: {name: next(turn), **fixed}, check, error)

    def _permute_error(self, got: torch.Tensor, call: dict[str, Any]) -> float:
        some = _sample(self.tokens)
        return _relative(got[self.inverse[0][some, -1].long()], self.x[some])

    def _unpermute_error(self, got: torch.Tensor, call: dict[str, Any]) -> float:
        some = _sample(self.tokens)
        return _relative(got[some], sum_in_order(self.y, self.inverse[0][some], self.weights[0][some]))


def _relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


def _sample(tokens: int) -> torch.Tensor:
    return torch.linspace(0, tokens - 1, min(tokens, CHECKED)).round().long()


def _gate_error(got: Any, call: dict[str, Any]) -> float:
    """The share of tokens with other experts, which rounding may give a few."""
    ours = moe_gate(**{**call, "out": None}).ids.long()
    return (got[1].sort(1).values != ours.sort(1).values).any(1).double().mean().item()


def _check_gate(out: Any, call: dict[str, Any]) -> None:
    options = {name: value for name, value in call.items() if name not in ("logits", "topk", "out")}
    check_gate(out, call["logits"], call["topk"], **options)


def _check_permute(out: Any, call: dict[str, Any]) -> None:
    order = call["ids"].flatten().argsort(stable=True)
    if not torch.equal(out.inverse.flatten()[order], torch.arange(len(order), dtype=torch.int32)):
        raise WrongResult("rows are not in the order of their experts and tokens")
    some = _sample(len(call["ids"]))
    x = call["x"] if call["format"] is None else moekern.per_token_cast_to_fp8(call["x"], call["format"])
    for moved, source in zip(*(tuple(x) if isinstance(x, ScaledTensor) else (x,) for x in (out.x, x)), strict=True):
        rows = moved.view(torch.uint8)[out.inverse[some].long()]
        if not torch.equal(rows, source.view(torch.uint8)[some].unsqueeze(1).expand_as(rows)):
            raise WrongResult("a row is not its token's")


def _check_unpermute(out: torch.Tensor, call: dict[str, Any]) -> None:
    some = _sample(len(out))
    check_unpermute(out[some], call["y"], call["inverse"][some], call["weights"][some])


def run(
    console: Console,
    ops: list[str],
    layers: list[str],
    tokens: tuple[int, ...],
    kinds: list[str],
    pattern: str | None,
    peers: list[type[RoutingPeer]],
    effort: Effort,
) -> tuple[list[Row], list[str]]:
    """A table for each op of each layer."""
    rows: list[Row] = []
    notes: list[str] = []
    stock = Stock(machine.cold_bytes(), PAGE)
    for layer in (LAYERS[name] for name in layers):
        found: dict[str, list[Row]] = {op: [] for op in ops}
        for count in tokens:
            case = Case(layer, count)
            for op in ops:
                made = [peer(case) for peer in peers if peer.op == op]
                problems = case.problems(op, kinds)
                found[op] += compete.compete(stock, layer.model, problems, pattern, made, effort, notes)
        for op, table in found.items():
            if not table:
                continue
            groups = f", {layer.kept_groups} of {layer.groups} groups" if layer.groups > 1 else ""
            what = f"{layer.scoring}{groups}" if op == "moe_gate" else f"H {layer.hidden}"
            console.print()
            console.print(
                f"[bold]{op} · {layer.model} · top {layer.top_k} of {layer.experts} · {what}", highlight=False
            )
            report.show(console, report.rows_table(table))
            rows += table
    return rows, notes
