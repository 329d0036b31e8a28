"""Grouped products: `python bench/run.py --op grouped`. An expert layer's weights from DRAM, fresh sizes every call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import report
import torch
from peers.grouped import GroupedPeer
from rich.console import Console
from suites import Linear
from timing import compete, machine
from timing.compete import Effort, Row
from timing.problems import Problem, check_gemm, nbytes, sampled_error
from timing.stock import PAGE, Stock

import moekern
from moekern import GroupedLayout, GroupedWeights, ScaledTensor, m_grouped_fp8_gemm_nt_contiguous
from moekern import m_grouped_fp8_gemm_nt_masked as masked_op
from moekern.testing.grouped_cases import products

ROWS, QUICK_ROWS = (8, 32, 128, 512, 2048), (8, 128)  # of all groups
GROUPS = 32  # DeepSeek-V3's 256 experts on eight ranks
SIZES = {"even": 0.0, "skewed": 1.0}  # the exponent of Zipf's law
FORMS = ("contiguous", "masked")
FRESH = 16  # layouts of a case, which its calls take in turn


def group_sizes(rows: int, groups: int, skew: float, seed: int) -> list[int]:
    """How many of the rows every group has: equal but for the remainder, or drawn by Zipf's law; in random order."""
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(groups, generator=g)
    if not skew:
        counts = torch.full((groups,), rows // groups)
        counts[order[: rows % groups]] += 1
        return counts.tolist()
    popularity = torch.arange(1, groups + 1, dtype=torch.float64) ** -skew
    drawn = torch.multinomial(popularity, rows, replacement=True, generator=g)
    return torch.bincount(order[drawn], minlength=groups).tolist()


@dataclass
class Case:
    """One layer, one number of rows, one form and one kind of sizes."""

    linear: Linear
    weights: GroupedWeights
    form: str
    sizes: str
    rows: int

    def __post_init__(self) -> None:
        self.groups = len(self.weights)
        counts = [group_sizes(self.rows, self.groups, SIZES[self.sizes], seed) for seed in range(FRESH)]
        self.capacity = max(max(c) for c in counts)
        self.layouts = [
            GroupedLayout.from_counts(c) if self.form == "contiguous" else GroupedLayout.from_masked(c, self.capacity)
            for c in counts
        ]
        self.hit = sum(sum(count > 0 for count in c) for c in counts) / FRESH
        lead = (self.rows,) if self.form == "contiguous" else (self.groups, self.capacity)
        self.x = torch.randn(*lead, self.linear.k).bfloat16()
        self.out = torch.zeros(*lead, self.linear.n, dtype=torch.bfloat16)

    @property
    def name(self) -> str:
        return f"{self.linear.name}, {self.form}, {self.sizes}"

    def layout(self, turn: int) -> GroupedLayout:
        return self.layouts[turn % FRESH]

    def problem(self, activations: str) -> Problem:
        a: Any = self.x
        if activations == "fp8":
            q, s = moekern.per_token_cast_to_fp8(self.x.view(-1, self.linear.k))
            lead = self.x.shape[:-1]
            a = ScaledTensor(q.view(*lead, -1), s.view(*lead, -1))
        turn = 0

        def arguments() -> dict[str, Any]:
            nonlocal turn
            turn += 1
            return {"a": a, "b": self.weights, "layout": self.layout(turn), "out": self.out}

        rows = self.rows / self.x[..., 0].numel()  # of a and out, what is read and written
        weights = nbytes(self.weights.group(0)) * self.hit
        return Problem(
            op=m_grouped_fp8_gemm_nt_contiguous if self.form == "contiguous" else masked_op,
            shape={"m": self.rows, "n": self.linear.n, "k": self.linear.k, "groups": self.groups},
            activations=activations,
            flops=2 * self.rows * self.linear.n * self.linear.k,
            bytes=round(weights + rows * nbytes(a, self.out)),
            moves="read",
            example={"a": a, "b": self.weights, "layout": self.layout(0), "out": self.out},
            arguments=arguments,
            check=check,
            error=error,
        )


def _groups_to_check(out: torch.Tensor, call: dict[str, Any]) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """The smallest and the largest group that have rows: their part of the result, and the product it should be."""
    layout = call["layout"]
    flat = out.view(-1, out.shape[-1])
    found = [
        (flat[rows], {"a": a, "b": b})
        for rows, (a, b) in zip(layout.slices(), products(call["a"], call["b"], layout), strict=True)
        if rows.stop > rows.start
    ]
    found.sort(key=lambda pair: len(pair[0]))
    return [found[0], found[-1]]


def check(out: torch.Tensor, call: dict[str, Any]) -> None:
    for part, product in _groups_to_check(out, call):
        check_gemm(part, product)


def error(out: torch.Tensor, call: dict[str, Any]) -> float:
    return max(sampled_error(part, product) for part, product in _groups_to_check(out, call))


def _dequantised(weights: GroupedWeights) -> torch.Tensor:
    dense = torch.empty(weights.shape, dtype=torch.bfloat16)
    for g in range(len(weights)):
        moekern.dequantize(weights.group(g), out=dense[g])
    return dense


def run(
    console: Console,
    linears: tuple[Linear, ...],
    groups: int,
    rows: tuple[int, ...],
    kinds: list[str],
    pattern: str | None,
    chosen: list[type[GroupedPeer]],
    effort: Effort,
) -> tuple[list[Row], list[str]]:
    """Every layer in every form with every kind of sizes: its rows, and notes."""
    found: list[Row] = []
    notes: list[str] = []
    for linear in linears:
        size = linear.n * linear.k
        if groups * size < machine.cold_bytes():
            notes.append(f"{linear.name}: the weights of {groups} groups fit the caches: shares are not of memory")
        stock = Stock(max(machine.cold_bytes(), groups * (size + PAGE) // 2), size)
        weights = GroupedWeights(stock.weights(linear.n, linear.k).items[:groups])
        fits = 2 * groups * size <= machine.memory_budget()
        if chosen and not fits:
            notes.append(f"peers left out at {linear.name}: no memory for {2 * groups * size / 1e9:.1f} GB of bf16")
        dense = _dequantised(weights) if chosen and fits else torch.empty(0)
        peers = [peer(dense) for peer in chosen if fits]
        for form in FORMS:
            for sizes in SIZES:
                part: list[Row] = []
                for m in rows:
                    case = Case(linear, weights, form, sizes, m)
                    bound = [peer for peer in peers if form in peer.forms]
                    for peer in bound:
                        peer.bind(case.x, case.out, case.layouts)
                    cases = [case.problem(activations) for activations in kinds]
                    part += compete.compete(stock, case.name, cases, pattern, bound, effort, notes)
                console.print()
                console.print(
                    f"[bold]grouped · {linear.name} · {form}, {sizes} · {groups} groups of N {linear.n} × K {linear.k} "
                    f"· {groups * size / 1e9:.2f} GB",
                    highlight=False,
                )
                if part:
                    report.show(console, report.rows_table(part))
                found += part
        del stock, weights, dense, peers
    return found, notes
