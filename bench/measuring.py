"""What run.py times on this machine: one function for each kind of subject, chosen by --op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import report
import suites
import typer
from options import numbers, words
from peers import choose
from peers.grouped import GROUPED_PEERS
from peers.linear import PEERS
from peers.moe import MOE_PEERS
from peers.routing import ROUTING_PEERS
from rich.console import Console
from subjects import engine, grouped, moe, overheads, routing
from subjects.linears import Bench
from timing import problems
from timing.compete import Effort, Row
from timing.stock import Stock

from moekern.testing.moe_models import LAYERS

P = TypeVar("P", bound="type[Any]")
OP_NAMES = list(problems.OPS)  # of one linear layer; the others are of whole sets of experts
ROUTING = {"routing": routing.OP_NAMES, **{name: [name] for name in routing.OP_NAMES}}
ALL_PEERS, QUICK_PEERS = "torch,onnxruntime", "torch-bf16,torch-fp32,torch-int8"
QUICK_MOE_PEERS, QUICK_GROUPED_PEERS = "torch-loop-bf16", "torch-mm-bf16"
MOE_LAYERS = "deepseek-v3,qwen3-30b-a3b,mixtral-like"
MODELS = "qwen3-30b-a3b"


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for; None where it leaves the choice."""

    suite: str
    op: str
    kernel: str | None
    m: str | None
    activations: str
    peers: str | None
    quick: bool
    overhead: bool
    groups: int
    layers: str | None
    checkpoint: Path | None
    layer: int
    depth: int

    @property
    def kinds(self) -> list[str]:
        return words("--activations", self.activations, ["bf16", "fp8"])

    @property
    def effort(self) -> Effort:
        return Effort(0.25, 9) if self.quick else Effort(1.0, 25)

    def rows(self, quick: tuple[int, ...], full: tuple[int, ...]) -> tuple[int, ...]:
        return numbers("--m", self.m) if self.m else quick if self.quick else full

    def names(self, default: str, allowed: list[str]) -> list[str]:
        return words("--layers", self.layers or default, allowed)


@dataclass
class Found:
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)  # peers, and why
    more: dict[str, Any] = field(default_factory=dict)  # that is of no row
    stock: Stock | None = None  # of operands, where calls around the kernels are timed too


def _peers(text: str, known: tuple[P, ...]) -> tuple[list[P], dict[str, str]]:
    try:
        return choose(text, known)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _moe(console: Console, wanted: Wanted) -> Found:
    chosen, absent = _peers(wanted.peers or (QUICK_MOE_PEERS if wanted.quick else ALL_PEERS), MOE_PEERS)
    names = wanted.names(MOE_LAYERS, list(LAYERS))
    weights = iter([moe.mapped(wanted.checkpoint, wanted.layer)]) if wanted.checkpoint else moe.load(names)
    tokens = wanted.rows(moe.QUICK_TOKENS, moe.TOKENS)
    effort = wanted.effort if wanted.quick else Effort(2.0, 25)
    rows, notes = moe.run(console, weights, tokens, wanted.kinds, wanted.kernel, chosen, effort)
    return Found(rows, notes, absent)


def _grouped(console: Console, wanted: Wanted) -> Found:
    chosen, absent = _peers(wanted.peers or (QUICK_GROUPED_PEERS if wanted.quick else "torch"), GROUPED_PEERS)
    experts = tuple(linear for linear in suites.load(wanted.suite).linears if linear.expert)
    if not experts:
        raise typer.BadParameter(f"{wanted.suite}: it has no experts", param_hint="--suite")
    of_all = wanted.rows(grouped.QUICK_ROWS, grouped.ROWS)
    rows, notes = grouped.run(
        console, experts, wanted.groups, of_all, wanted.kinds, wanted.kernel, chosen, wanted.effort
    )
    return Found(rows, notes, absent)


def _model(console: Console, wanted: Wanted) -> Found:
    names = wanted.names(MODELS, list(engine.CONFIGS))
    prompts = wanted.rows(engine.QUICK_PREFILL, engine.PREFILL)
    effort = Effort(1.0, 9) if wanted.quick else Effort(4.0, 25)
    slices, notes = engine.run(console, names, wanted.depth, prompts, effort)
    return Found(notes=notes, more={"slices": [found.to_json() for found in slices]})


def _routing(console: Console, wanted: Wanted) -> Found:
    chosen, absent = _peers(wanted.peers or "torch", ROUTING_PEERS)
    tokens = wanted.rows(routing.QUICK_TOKENS, routing.TOKENS)
    names = wanted.names(MOE_LAYERS, list(LAYERS))
    rows, notes = routing.run(
        console, ROUTING[wanted.op], names, tokens, wanted.kinds, wanted.kernel, chosen, wanted.effort
    )
    return Found(rows, notes, absent)


def _linears(console: Console, wanted: Wanted) -> Found:
    chosen, absent = _peers(wanted.peers or (QUICK_PEERS if wanted.quick else ALL_PEERS), PEERS)
    ops = OP_NAMES if wanted.op == "all" else words("--op", wanted.op, OP_NAMES)
    table = suites.load(wanted.suite)
    bench = Bench(console, ops, table.linears, wanted.rows(table.quick_m, table.m), wanted.kinds)
    bench.run(wanted.kernel, chosen, wanted.effort)
    found = Found(bench.rows, list(bench.notes), absent)
    if not found.rows and not found.notes:
        raise typer.BadParameter(f"{wanted.kernel}: no kernel of that name accepts any case", param_hint="--kernel")
    found.stock = bench.stock
    return found


SUBJECTS: dict[str, Callable[[Console, Wanted], Found]] = {
    "moe": _moe,
    "grouped": _grouped,
    "model": _model,
    **dict.fromkeys(ROUTING, _routing),
}


def measure(console: Console, result: dict[str, Any], wanted: Wanted) -> None:
    """Rows, notes and whatever else there is go into the result."""
    found = SUBJECTS.get(wanted.op, _linears)(console, wanted)
    if found.rows:
        report.legend(console, found.rows, found.absent)
    if found.stock and wanted.overhead and wanted.kernel is None:
        found.more["overheads"], more = overheads.run(console, found.stock, wanted.effort, wanted.quick)
        found.notes += more
    result["rows"] = found.rows
    result["title"] = f"{wanted.op} · {suites.load(wanted.suite).model}"
    result["notes"] += found.notes
    result.update(found.more)
