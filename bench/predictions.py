"""How far predictions are from what is published: `run.py accuracy`. Fitted rows and held-out ones stand apart."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import published
from devices import known
from model import cpu, fit
from model.fit import Error
from model.layers import DEEPSEEK_R1, experts_only, forward
from report import bare_table, duration
from rich.console import Console

from moekern.models import Experts

# The aim, of rows that were not fitted on: mean and worst.
AIMS = {"h800": (0.12, 0.30), "mi300x": (0.20, None), "this": (0.15, None)}


@dataclass(frozen=True)
class Group:
    """Rows of one kind on one device."""

    device: str
    what: str
    held: bool  # not fitted on
    error: Error

    @property
    def kind(self) -> str:
        return "held out" if self.held else "fitted"


@cache
def checks(device: str) -> tuple[fit.Check, ...]:
    """Every published product of a device beside its prediction: a second's work, of which a page has two uses."""
    return tuple(fit.checks(device))


def _products(device: str, held: bool) -> list[float]:
    return [check.error for check in checks(device) if check.held == held]


def moe_errors(device: str) -> list[float]:
    found = []
    for row in published.moes():
        if row.device == device:
            experts = Experts(row.experts, row.top_k, row.hidden, row.intermediate)
            found.append(experts_only(known()[device], row.tokens, experts) / row.seconds - 1)
    return found


def groups() -> list[Group]:
    found = []
    for device in ("h800", "mi300x", "mi308x", "mi355x"):
        for held in (False, True):
            if errors := _products(device, held):
                found.append(Group(device, "products", held, fit.error(errors)))
        if errors := moe_errors(device):
            found.append(Group(device, "fused experts", True, fit.error(errors)))
    for device in fit.LINK_PRIOR:
        for held in (False, True):
            errors = [check.error for check in fit.link_checks(device) if check.held == held]
            found.append(Group(device, "dispatch, combine", held, fit.error(errors)))
    for core, name in cpu.CORES.items():
        for held in (False, True):
            errors = [check.error for check in fit.cpu_checks(core) if check.held == held]
            found.append(Group("this", f"products, AVX2 ({name})", held, fit.error(errors)))
    return found


def show(console: Console, cross: bool, rows: bool) -> None:
    table = bare_table()
    for name in ("device", "what", "", "rows", "mean error", "worst", "aim"):
        table.add_column(name, justify="right" if name in ("rows", "mean error", "worst") else "left", no_wrap=True)
    for group in groups():
        mean, worst = AIMS.get(group.device, (None, None))
        aim = f"mean {mean:.0%}" + (f", worst {worst:.0%}" if worst else "") if mean else ""
        error = group.error
        shown = aim if group.held and group.what.startswith("products") else ""
        table.add_row(group.device, group.what, group.kind, str(error.rows), f"{error.mean:.1%}", f"{error.worst:+.0%}",
                      shown)  # fmt: skip
    console.print(table)
    console.print(
        "[dim]Held out: whole shapes (N, K) that no constant was fitted on; fused experts and the MI308X were never "
        "fitted at all. Tiles of AITER's kernels are predicted too, but for the fit.",
        highlight=False,
    )
    for row in published.servings():
        found = forward(known()[row.device], row.tokens, row.context, row.ranks, row.phase == "prefill", DEEPSEEK_R1)
        low, high = row.tokens / found.seconds, row.tokens / found.hidden
        console.print(
            f"DeepSeek-R1 {row.phase} on {row.device}, EP {row.ranks}: published {row.rate:.0f} tokens/s, predicted "
            f"{low:.0f} without overlap of links to {high:.0f} with all of it",
            highlight=False,
        )
    if rows:
        _rows(console)
    if cross:
        for device in fit.PRIOR:
            error = fit.error(check.error for check in fit.leave_one_shape_out(device))
            console.print(f"{device}: every shape left out in turn: {error}", highlight=False)


def _rows(console: Console) -> None:
    table = bare_table()
    for name in ("device", "source", "op", "groups", "M", "N", "K", "published", "predicted", "error", ""):
        table.add_column(name, justify="left" if name in ("device", "source", "op", "") else "right", no_wrap=True)
    for device in ("h800", "mi300x", "mi308x", "mi355x"):
        for check in checks(device):
            row = check.row
            table.add_row(
                device, row.source, row.op, str(row.groups), str(row.m), str(row.n), str(row.k), duration(row.seconds),
                duration(check.predicted.seconds), f"{check.error:+.0%}", "held out" if check.held else "fitted",
            )  # fmt: skip
    console.width = 140
    console.print(table)
