"""One comparison: kernels of a problem, peers and the machine's limits, checked, then timed in turns."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peers.linear import Peer

import moekern
from moekern import Kernel, ScaledTensor
from timing.limits import Limits
from timing.measure import Contender, Samples, interleave
from timing.problems import Problem
from timing.stock import Stock

WRONG = "WRONG RESULT"
PEER_ERROR = 0.1  # relative rms beyond which a peer computes something else


@dataclass
class Effort:
    budget: float  # seconds for the samples of one contender
    most: int  # samples of one contender


@dataclass
class Row:
    """One kernel on one problem."""

    op: str
    linear: str
    shape: dict[str, int]
    activations: str
    kernel: str
    selected: bool  # by the dispatcher, not by --kernel alone
    flops: int
    bytes: int
    moves: str
    samples: Samples
    limits: dict[str, float]
    binds: str
    fraction: float  # of the limit that binds
    peers: dict[str, Samples] = field(default_factory=dict)
    peer_errors: dict[str, float] = field(default_factory=dict)

    @property
    def isa(self) -> str:
        """The instruction set of the kernel, whose multiply-add limit counts."""
        return self.kernel.removeprefix("cpu.").removesuffix("_stream")

    @property
    def gflops(self) -> float:
        return self.flops / self.samples.median / 1e9

    @property
    def gbps(self) -> float:
        return self.bytes / self.samples.median / 1e9

    def ratio(self, peer: str) -> float:
        """How many times faster than the peer."""
        return self.peers[peer].median / self.samples.median

    def to_json(self) -> dict[str, Any]:
        return {
            "op": self.op,
            "linear": self.linear,
            **self.shape,
            "activations": self.activations,
            "kernel": self.kernel,
            "selected": self.selected,
            "time": self.samples.to_json(),
            "flops": self.flops,
            "bytes": self.bytes,
            "gflops": self.gflops,
            "gbps": self.gbps,
            "limits": self.limits,
            "binds": self.binds,
            "fraction": self.fraction,
            "peers": {
                name: {"time": samples.to_json(), "ratio": self.ratio(name), "rms_error": self.peer_errors[name]}
                for name, samples in self.peers.items()
            },
        }


def kernels_of(problem: Problem, pattern: str | None) -> list[tuple[Kernel, bool]]:
    """The kernel the dispatcher takes, or with a pattern all that match and accept; and whether it is that one."""
    call = problem.prepared()
    device = moekern.devices()[0]
    selected = problem.op.select(device, *call)
    if pattern is None:
        return [(selected, True)]
    return [
        (kernel, kernel is selected)
        for kernel in problem.op.kernels
        if re.search(pattern, kernel.name) and kernel.why_not(device, *call) is None
    ]


def checked_peers(bound: list[Any], problem: Problem, notes: list[str], where: str) -> dict[str, tuple[Any, float]]:
    """Peers that compute the same layer, with their relative rms error."""
    kept = {}
    for peer in bound:
        try:
            assert problem.error is not None
            error = problem.error(peer.call(0), problem.example)
        except RuntimeError as failure:
            notes.append(f"{peer.name} left out at {where}: {failure}")
            continue
        if error < PEER_ERROR:
            kept[peer.name] = (peer, error)
        else:
            notes.append(f"{peer.name} left out at {where}: its result is wrong (relative rms error {error:.2g})")
    return kept


def compete(
    stock: Stock,
    linear: str,
    problems: list[Problem],
    pattern: str | None,
    peers: list[Any],
    effort: Effort,
    notes: list[str],
) -> list[Row]:
    """Rows of all kernels of the problems, which share shapes and so their peers and limits.

    A kernel with a wrong result gets a note instead of a row.
    """
    entries: list[tuple[str, Problem, Kernel, bool]] = []
    for problem in problems:
        for kernel, selected in kernels_of(problem, pattern):
            name = f"{problem.activations} {kernel.name}"
            call = problem.example
            try:
                with moekern.use(kernel={problem.op.name: kernel.name}):
                    problem.check(problem.op(**call), call)
            except AssertionError as wrong:
                shape = " ".join(f"{key}={value}" for key, value in problem.shape.items())
                notes.append(f"{WRONG}, not timed: {problem.op.name} {name} {shape}: {wrong}")
                continue
            entries.append((name, problem, kernel, selected))
    if not entries:
        return []
    limits = Limits(stock, [kernel for _, _, kernel, _ in entries], copying=problems[0].moves == "copy")
    known = checked_peers(peers, problems[0], notes, f"m={problems[0].shape['m']} of {linear}")
    contenders = [
        Contender(name, problem.call, partial(moekern.use, kernel={problem.op.name: kernel.name}))
        for name, problem, kernel, _ in entries
    ]
    contenders += limits.contenders
    contenders += [Contender(name, peer.call) for name, (peer, _) in known.items()]
    samples = interleave(contenders, effort.budget, effort.most)
    rows = []
    for name, problem, kernel, selected in entries:
        peaks = limits.peaks(kernel, samples)
        least = peaks.seconds(problem.flops, problem.bytes, problem.moves)
        rows.append(
            Row(
                op=problem.op.name,
                linear=linear,
                shape=problem.shape,
                activations=problem.activations,
                kernel=kernel.name,
                selected=selected,
                flops=problem.flops,
                bytes=problem.bytes,
                moves=problem.moves,
                samples=samples[name],
                limits={key: value for key, value in vars(peaks).items() if not math.isnan(value)},
                binds=peaks.binds(problem.flops, problem.bytes, problem.moves),
                fraction=least / samples[name].median,
                peers={peer: samples[peer] for peer in known},
                peer_errors={peer: error for peer, (_, error) in known.items()},
            )
        )
    return rows


def make_peers(
    chosen: list[type[Peer]], scaled: ScaledTensor, cold: int, memory: int, notes: list[str], linear: str
) -> list[Peer]:
    """Peers for one linear layer, with as many copies of its weights as keep them cold."""
    made = []
    numel = scaled.data.numel()
    w: torch.Tensor | None = None
    for peer in chosen:
        copies = math.ceil(cold / (numel * peer.weight_bytes)) + 1
        if copies * numel * peer.weight_bytes > memory:
            notes.append(f"{peer.name} left out at {linear}: no memory for {copies} copies of its weights")
            continue
        if w is None:
            w = moekern.dequantize(scaled)
        made.append(peer(w, scaled, copies))
    return made
