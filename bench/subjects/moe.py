"""Mixture-of-Experts layers: `python bench/run.py --op moe`. Weights from DRAM, a fresh routing for every call."""

from __future__ import annotations

import gc
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import report
import torch
from peers.moe import MoePeer, Routing
from rich.console import Console
from timing import machine
from timing.compete import PEER_ERROR, WRONG, Effort, Row
from timing.limits import Limits
from timing.measure import Contender, interleave
from timing.stock import PAGE, Stock

import moekern
from moekern import ExpertWeights, Kernel, fused_experts, fused_experts_workspace
from moekern.checkpoint import Checkpoint
from moekern.testing.expert_numerics import experts_oracle
from moekern.testing.moe_models import LAYERS, MoeLayer, random_experts, routing, shared_experts
from moekern.testing.numerics import check_bound

TOKENS, QUICK_TOKENS = (1, 8, 64, 512, 4096), (1, 8, 64)
ROUTINGS = {"even": 0.0, "skewed": 1.0}  # the exponent of Zipf's law
FRESH = 32  # routings of a case, which its calls take in turn
MEMORY = 0.6  # of what is free, for the weights of a layer
CHECKED = 2  # experts of the tokens that are checked: float64 takes a second for each


@dataclass
class Weights:
    layer: MoeLayer
    experts: ExpertWeights
    shared: ExpertWeights | None
    said: str  # what is not as published

    @property
    def options(self) -> dict[str, Any]:
        return {**self.layer.options, "shared": self.shared}


def load(names: list[str]) -> Iterator[Weights]:
    """Random weights of published layers, one layer at a time."""
    for name in names:
        layer, said = LAYERS[name], ""
        fitting = int(MEMORY * psutil.virtual_memory().available / layer.expert_bytes) - layer.shared
        if fitting < layer.experts:
            said = f", {fitting} of its {layer.experts} experts: no memory for more"
            layer = replace(layer, experts=fitting)
        yield Weights(layer, random_experts(layer), shared_experts(layer), said)


def mapped(folder: Path, index: int) -> Weights:
    """A layer of a checkpoint, its weights where the file is mapped."""
    found = Checkpoint(folder).moe_layer(index)
    experts, shared = found.experts, found.shared
    known = (layer for layer in LAYERS.values() if layer.hidden == experts.hidden_size)
    like = next((layer for layer in known if layer.intermediate == experts.intermediate_size), None)
    layer = MoeLayer(
        model=f"{folder.name}, layer {index}",
        source=str(folder),
        hidden=experts.hidden_size,
        intermediate=experts.intermediate_size,
        experts=experts.num_experts,
        top_k=min(like.top_k if like else 8, experts.num_experts),
        shared=0 if shared is None else shared.intermediate_size // experts.intermediate_size,
    )
    for tensor in experts.tensors:  # from the disk once, before the clock starts
        tensor.view(torch.uint8).view(-1)[::PAGE].sum()
    return Weights(layer, experts, shared, ", mapped")


class Case:
    """One number of tokens with one kind of routing, and what a call cannot do without."""

    def __init__(self, weights: Weights, kind: str, tokens: int) -> None:
        layer = weights.layer
        self.weights, self.kind, self.tokens = weights, kind, tokens
        seeds = range(FRESH)
        skew = ROUTINGS[kind]
        self.routings = [
            routing(tokens, layer.experts, layer.top_k, skew, layer.scaling, seed=1000 * tokens + s) for s in seeds
        ]
        self.x = torch.randn(tokens, layer.hidden).bfloat16()
        self.out = torch.empty_like(self.x)
        self.hit = sum(len(ids.unique()) for ids, _ in self.routings) / FRESH
        slots = tokens * (layer.top_k + layer.shared)
        self.flops = 6 * layer.intermediate * layer.hidden * slots
        of_weights = (self.hit + layer.shared) * layer.expert_bytes
        self.bytes = round(of_weights) + 2 * self.x.numel() * self.x.element_size()

    def routing(self, turn: int) -> Routing:
        return self.routings[turn % FRESH]

    def options(self, activations: str) -> dict[str, Any]:
        return {**self.weights.options, "quantize_activations": activations == "fp8"}

    def kernels(self, pattern: str | None, activations: str) -> list[tuple[Kernel, bool]]:
        """The kernel the dispatcher takes, or with a pattern all that match and accept; and whether it is that one."""
        call = fused_experts.prepare(
            self.x, self.weights.experts, *self.routing(0), **self.options(activations), out=self.out
        )
        device = moekern.devices()[0]
        selected = fused_experts.select(device, *call)
        if pattern is None:
            return [(selected, True)]
        return [
            (kernel, kernel is selected)
            for kernel in fused_experts.kernels
            if re.search(pattern, kernel.name) and kernel.why_not(device, *call) is None
        ]

    def runner(self, activations: str) -> tuple[Any, int]:
        """call(turn) with a workspace of its own, and the bytes of that."""
        options = self.options(activations)
        size = fused_experts_workspace(self.tokens, self.weights.layer.top_k, self.weights.experts, **options)
        workspace = torch.zeros(size, dtype=torch.uint8)

        def call(turn: int) -> torch.Tensor:
            ids, w = self.routing(turn)
            return fused_experts(self.x, self.weights.experts, ids, w, out=self.out, workspace=workspace, **options)

        return call, size

    def check(self, kernel: Kernel, activations: str) -> None:
        """The first and the last token against float64, on few experts; the others as they come."""
        ids, w = (t.clone() for t in self.routing(0))
        ids[0, CHECKED:] = -1
        ids[-1] = ids[0]
        options = self.options(activations)
        with moekern.use(kernel={fused_experts.name: kernel.name}):
            out = fused_experts(self.x, self.weights.experts, ids, w, **options)
        if not out.isfinite().all():
            raise AssertionError(f"{int((~out.isfinite()).sum())} of {out.numel()} results are not finite")
        rows = [0] if self.tokens == 1 else [0, self.tokens - 1]
        check_bound(out[rows], experts_oracle(self.x[rows], self.weights.experts, ids[rows], w[rows], **options))


def checked_peers(peers: list[MoePeer], case: Case, notes: list[str]) -> dict[str, tuple[MoePeer, float]]:
    """Peers that compute the same layer, with their relative rms error against W8A16."""
    kept = {}
    ids, w = case.routing(0)
    expected = fused_experts(case.x, case.weights.experts, ids, w, **case.options("bf16")).float()
    for peer in peers:
        peer.bind(case.x)
        try:
            error = ((peer.call((ids, w)).float() - expected).norm() / expected.norm()).item()
        except RuntimeError as failure:
            notes.append(f"{peer.name} left out at {case.weights.layer.model} T={case.tokens}: {failure}")
            continue
        if error < PEER_ERROR:
            kept[peer.name] = (peer, error)
        else:
            notes.append(f"{peer.name} left out at {case.weights.layer.model}: its result is wrong ({error:.2g})")
    return kept


def compete(
    stock: Stock,
    case: Case,
    kinds: list[str],
    pattern: str | None,
    peers: list[MoePeer],
    effort: Effort,
    notes: list[str],
) -> tuple[list[Row], int]:
    """Rows of all kernels of a case, and the largest workspace."""
    layer = case.weights.layer
    entries, contenders, largest = [], [], 0
    for activations in kinds:
        for kernel, selected in case.kernels(pattern, activations):
            name = f"{activations} {kernel.name}"
            try:
                case.check(kernel, activations)
            except AssertionError as wrong:
                notes.append(f"{WRONG}, not timed: moe {name} {layer.model} T={case.tokens}: {wrong}")
                continue
            around = partial(moekern.use, kernel={fused_experts.name: kernel.name})
            with around():
                call, size = case.runner(activations)
            largest = max(largest, size)
            entries.append((name, activations, kernel, selected))
            contenders.append(Contender(name, call, around))
    if not entries:
        return [], largest
    limits = Limits(stock, [kernel for *_, kernel, _ in entries], copying=False)
    known = checked_peers(peers, case, notes)
    contenders += limits.contenders
    for name, (peer, _) in known.items():
        contenders.append(Contender(name, lambda turn, peer=peer: peer.call(case.routing(turn))))
    samples = interleave(contenders, effort.budget, effort.most)
    rows = []
    for name, activations, kernel, selected in entries:
        peaks = limits.peaks(kernel, samples)
        rows.append(
            Row(
                op="moe",
                linear=f"{layer.model} {case.kind}",
                shape={"m": case.tokens, "n": layer.intermediate, "k": layer.hidden, "experts": layer.experts},
                activations=activations,
                kernel=kernel.name,
                selected=selected,
                flops=case.flops,
                bytes=case.bytes,
                moves="read",
                samples=samples[name],
                limits={key: value for key, value in vars(peaks).items() if not math.isnan(value)},
                binds=peaks.binds(case.flops, case.bytes, "read"),
                fraction=peaks.seconds(case.flops, case.bytes, "read") / samples[name].median,
                peers={peer: samples[peer] for peer in known},
                peer_errors={peer: error for peer, (_, error) in known.items()},
            )
        )
    return rows, largest


def make_peers(chosen: list[type[MoePeer]], weights: Weights, notes: list[str]) -> list[MoePeer]:
    made = []
    layer = weights.layer
    for peer in chosen:
        size = peer.weight_bytes * 3 * layer.intermediate * layer.hidden * (layer.experts + layer.shared)
        if size > machine.memory_budget():
            notes.append(f"{peer.name} left out at {layer.model}: no memory for {size / 1e9:.1f} GB of its weights")
        elif layer.options != MoeLayer.options.fget(layer) or layer.biases:  # type: ignore[attr-defined]
            notes.append(f"{peer.name} left out at {layer.model}: it has another activation")
        else:
            try:
                made.append(peer(weights.experts, weights.shared))
            except RuntimeError as reason:
                notes.append(f"{peer.name} left out at {layer.model}: {reason}")
    return made


def _resident() -> str:
    """Memory of the process that is in use: its own, and what is mapped from files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, files = (int(status[key].split()[0]) / 2**20 for key in ("RssAnon", "RssFile"))
    return f"resident {own + files:.2f} GiB, {files:.2f} of it mapped files"


def run(
    console: Console,
    weights: Iterator[Weights],
    tokens: tuple[int, ...],
    kinds: list[str],
    pattern: str | None,
    peers: list[type[MoePeer]],
    effort: Effort,
) -> tuple[list[Row], list[str]]:
    """Every layer with every routing: its rows, and notes."""
    rows: list[Row] = []
    notes: list[str] = []
    stock = Stock(machine.cold_bytes(), PAGE)
    for layer_weights in weights:
        started = time.perf_counter()
        layer = layer_weights.layer
        size = layer.expert_bytes * (layer.experts + layer.shared)
        made = make_peers(peers, layer_weights, notes)
        shared = f" + {layer.shared} shared" if layer.shared else ""
        console.print()
        console.print(
            f"[bold]{layer.model}[/] · {layer.experts} experts{shared}, top {layer.top_k} · H {layer.hidden} × "
            f"I {layer.intermediate} · {size / 1e9:.2f} GB{layer_weights.said}",
            highlight=False,
        )
        if size < machine.cold_bytes():
            notes.append(f"{layer.model}: its weights fit the caches: floors and shares are of memory that is not used")
        for kind in ROUTINGS:
            found, hits, workspaces = [], [], []
            for count in tokens:
                case = Case(layer_weights, kind, count)
                more, workspace = compete(stock, case, kinds, pattern, made, effort, notes)
                found += more
                hits.append(f"{case.hit:.0f}")
                workspaces.append(f"{workspace / 2**20:.1f}")
            console.print(
                f"{kind} routing · experts hit: {', '.join(hits)} · workspace, MiB: {', '.join(workspaces)}",
                highlight=False,
            )
            if found:
                report.show(console, report.rows_table(found))
            rows += found
        console.print(f"[dim]{_resident()} · {time.perf_counter() - started:.0f} s")
        del made, layer_weights, case
        gc.collect()
    return rows, notes
