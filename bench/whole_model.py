"""A whole model on many devices, from the same constants as a single product: `run.py --what deepseek-r1`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import published
from devices import THIS, Device, known
from model import constants
from model.layers import MODELS, Decoder, Pass, forward, weights_of
from report import bare_table, duration
from report import show as show_table
from rich.console import Console
from rich.text import Text

PHASES = ("decode", "prefill")
TOKENS = {"decode": 128, "prefill": 16384}  # on each rank, where --tokens says nothing
RANKS, CONTEXT = 32, 4096


@dataclass(frozen=True)
class Run:
    """One phase on one device, or why not."""

    device: Device
    phase: str
    tokens: int
    ranks: int
    context: int
    found: Pass | None
    reason: str = ""
    short: float = 0.0  # bytes of weights that don't fit

    def to_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {
            "device": self.device.name,
            "title": self.device.title,
            "phase": self.phase,
            "tokens": self.tokens,
            "ranks": self.ranks,
            "context": self.context,
            "dtype": self.device.eight_bit,
            "reason": self.reason,
        }
        if self.found:
            row |= {
                "seconds": self.found.seconds,
                "seconds_with_links_hidden": self.found.hidden,
                "tokens_per_second": [self.found.tokens / s for s in (self.found.seconds, self.found.hidden)],
                "moe_layer": [vars(step) for step in self.found.moe],
                "attention": [vars(step) for step in self.found.attention],
            }
        return row


def _run(device: Device, phase: str, tokens: int, ranks: int, context: int, decoder: Decoder) -> Run:
    try:
        found = forward(device, tokens, context, ranks, phase == "prefill", decoder)
    except ValueError as reason:
        return Run(device, phase, tokens, ranks, context, None, str(reason))
    short = max(0.0, weights_of(decoder, ranks) - device.memory.value)
    return Run(device, phase, tokens, ranks, context, found, short=short)


def runs(
    names: Iterable[str], this: Device | None, model: str, tokens: int | None, ranks: int, context: int
) -> list[Run]:
    decoder = MODELS[model]
    found = []
    for phase in PHASES:
        for name in names:
            device = this if name == THIS else known()[name]
            assert device is not None
            found.append(_run(device, phase, tokens or TOKENS[phase], ranks, context, decoder))
    return found


def _rate(tokens: float) -> str:
    return f"{tokens:,.0f}" if tokens >= 10 else f"{tokens:.2g}"


def _layer(console: Console, found: list[Run]) -> None:
    """A MoE layer step by step, a column for every device."""
    present = [run for run in found if run.found]
    if not present:
        return
    shown = bare_table()
    shown.add_column("MoE layer")
    for run in present:
        shown.add_column(run.device.name, justify="right")
    names = dict.fromkeys(step.name for run in present if run.found for step in run.found.moe)
    for name in names:
        cells = []
        for run in present:
            assert run.found
            seconds = [step.seconds for step in run.found.moe if step.name == name]
            cells.append(duration(seconds[0]) if seconds else "")
        shown.add_row(name, *cells)
    sums = [duration(math.fsum(step.seconds for step in run.found.moe)) for run in present if run.found]
    shown.add_row(Text("all of it", "bold"), *(Text(text, "bold") for text in sums))
    show_table(console, shown)


def _model(console: Console, found: list[Run], decoder: Decoder) -> None:
    shown = bare_table()
    for name in ("device", "type", "one pass", "links hidden", "tokens/s a device", "published", "constants", ""):
        shown.add_column(name, justify="right" if name in ("one pass", "links hidden", "tokens/s a device") else "left")
    for run in found:
        basis = constants.basis(run.device.name, run.device.family).basis
        if not run.found:
            shown.add_row(run.device.name, run.device.eight_bit, "", "", "", "", basis, Text(run.reason, "red"))
            continue
        notes = f"weights exceed its memory by {run.short / 1e9:.0f} GB" if run.short else ""
        others = [row for row in published.servings() if (row.device, row.phase) == (run.device.name, run.phase)]
        says = ", ".join(f"{row.rate:.0f} (EP {row.ranks}, {row.tokens} tokens)" for row in others)
        shown.add_row(
            run.device.name,
            run.device.eight_bit,
            duration(run.found.seconds),
            duration(run.found.hidden),
            f"{_rate(run.tokens / run.found.seconds)} to {_rate(run.tokens / run.found.hidden)}",
            Text(says, "cyan"),
            basis,
            Text(notes, "red"),
        )
    show_table(console, shown)


def show(console: Console, found: list[Run], model: str) -> None:
    decoder = MODELS[model]
    for phase in PHASES:
        of_phase = [run for run in found if run.phase == phase]
        first = of_phase[0]
        what = "a token of each of" if phase == "decode" else "prompts of"
        length = f"{first.context} tokens, " if phase == "prefill" else ""
        console.print()
        console.print(
            f"[bold]{decoder.title}[/] · {phase} · {what} {length}{first.tokens} tokens a rank · context "
            f"{first.context} · {first.ranks} ranks · {decoder.layers} layers, predicted",
            highlight=False,
        )
        _layer(console, of_phase)
        _model(console, of_phase, decoder)
    console.print(
        "[dim]One pass: every kernel after another. Links hidden: two halves of the tokens take turns, so that links "
        "work while cores compute. What is published has other numbers of ranks and tokens: they are in brackets.",
        highlight=False,
    )
