"""Dispatch and combine among processes: `torchrun --nproc-per-node 2 bench/run.py ep`.

What runs here is gloo over the machine's own memory; beside it stand the model's figures for links of accelerators.
Tokens go in FP8 with their scales to the ranks of their experts, and come back in bf16, as DeepEP's throughput kernels
do it: once to every rank that has an expert of theirs.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import report
import torch
import torch.distributed as dist
from devices import known
from model import exchange
from rich.console import Console
from rich.text import Text

import moekern
from moekern import ScaledTensor
from moekern.testing.moe_models import routing

SAMPLES = 15
# Whose links are predicted, and how many of the ranks share a server: one, where all goes over the network.
BESIDE = {"nvlink, H800": ("h800", None), "rdma, H800": ("h800", 1), "infinity fabric, MI300X": ("mi300x", None),
          "hccs, 910C": ("ascend910c", None)}  # fmt: skip
START = "torchrun --nproc-per-node 2 bench/run.py ep"


@dataclass
class Exchange:
    """One rank's part of an exchange of so many tokens."""

    tokens: int
    hidden: int
    ids: torch.Tensor  # experts of every token
    experts: int
    ranks: int
    rank: int

    def __post_init__(self) -> None:
        held = self.experts // self.ranks
        goes = torch.zeros(self.tokens, self.ranks, dtype=torch.bool)
        goes.scatter_(1, self.ids // held, True)
        self.order = torch.cat([goes[:, rank].nonzero().flatten() for rank in range(self.ranks)])
        self.sent = goes.sum(0).tolist()
        counts = torch.empty(self.ranks, dtype=torch.int64)
        dist.all_to_all_single(counts, torch.tensor(self.sent))
        self.received = counts.tolist()

    def _exchange(self, rows: torch.Tensor, back: bool) -> torch.Tensor:
        """Rows to their ranks, or back: as bytes, since gloo knows neither FP8 nor bf16."""
        sent, received = (self.received, self.sent) if back else (self.sent, self.received)
        bytes = rows.contiguous().view(torch.uint8)
        out = bytes.new_empty(sum(received), bytes.shape[1])
        dist.all_to_all_single(out, bytes, received, sent)
        return out.view(rows.dtype)

    def dispatch(self, x: ScaledTensor) -> ScaledTensor:
        codes = self._exchange(x.data.view(torch.uint8)[self.order], back=False)
        scale = self._exchange(x.scale[self.order], back=False)
        return ScaledTensor(codes.view(x.data.dtype), scale, x.block)

    def combine(self, rows: torch.Tensor) -> torch.Tensor:
        """The sum of what every rank made of a token."""
        returned = self._exchange(rows, back=True)
        out = torch.zeros(self.tokens, self.hidden)
        return out.index_add_(0, self.order, returned.float()).bfloat16()

    @property
    def remote(self) -> int:
        """Tokens that this rank sends to others."""
        return sum(self.sent) - self.sent[self.rank]


def check(one: Exchange) -> None:
    """Tokens come where they belong, unchanged, and their sums back. Raises AssertionError."""
    x = torch.randn(one.tokens, one.hidden, generator=torch.Generator().manual_seed(one.rank)).bfloat16()
    quantised = moekern.per_token_cast_to_fp8(x)
    arrived = one.dispatch(quantised)
    back = one.combine(moekern.dequantize(arrived).bfloat16())
    # Every rank returned what it got, so the sum is the token times the number of ranks that got it.
    times = torch.bincount(one.order, minlength=one.tokens).float()[:, None]
    expected = times * moekern.dequantize(quantised)
    if not torch.allclose(back.float(), expected.float(), rtol=2**-7, atol=1e-6):
        raise AssertionError(f"rank {one.rank}: combine returned other sums than dispatch sent")


def timed(call: Callable[[], object]) -> list[float]:
    """Seconds of a call on the slowest rank, several times; all ranks start together."""
    found = []
    for i in range(SAMPLES + 2):
        dist.barrier()
        start = time.perf_counter()
        call()
        seconds = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        if i >= 2:
            found.append(seconds.item())
    return found


def _measure(tokens: int, hidden: int, experts: int, top_k: int) -> tuple[dict[str, list[float]], int]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    ids, _ = routing(tokens, experts, top_k, seed=rank)
    one = Exchange(tokens, hidden, ids, experts, ranks, rank)
    check(one)
    x = moekern.per_token_cast_to_fp8(torch.randn(tokens, hidden).bfloat16())
    rows = moekern.dequantize(one.dispatch(x)).bfloat16()
    return {"dispatch": timed(lambda: one.dispatch(x)), "combine": timed(lambda: one.combine(rows))}, one.remote


def main(console: Console, tokens: tuple[int, ...], hidden: int, experts: int, top_k: int, json: Path | None) -> None:
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise ValueError(f"there is one process here, and an exchange takes two: {START}")
    ranks = int(os.environ["WORLD_SIZE"])
    if experts % ranks or top_k > experts:
        raise ValueError(f"--experts {experts}: a multiple of {ranks} ranks, and no less than --top-k {top_k}")
    if hidden % 128:
        raise ValueError(f"--hidden {hidden}: a multiple of 128")
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        found = {count: _measure(count, hidden, experts, top_k) for count in tokens}
        if dist.get_rank() == 0:
            rows = _rows(found, hidden, top_k, ranks)
            _show(console, rows, ranks, hidden, top_k)
            if json:
                report.write_json(json, {"ranks": ranks, "hidden": hidden, "top_k": top_k, "results": rows})
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _rows(
    found: dict[int, tuple[dict[str, list[float]], int]], hidden: int, top_k: int, ranks: int
) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for tokens, (samples, remote) in found.items():
        for phase, seconds in samples.items():
            median = statistics.median(seconds)
            mad = statistics.median(abs(s - median) for s in seconds)
            bytes = remote * exchange.payload(phase, hidden, "fp8")
            predicted = {}
            for name, (device, node) in BESIDE.items():
                at = exchange.predict(known()[device], phase, tokens, max(ranks, 2), hidden, top_k, node=node)
                predicted[name] = at.seconds
            rows.append({"tokens": tokens, "phase": phase, "seconds": median, "spread": mad / median, "bytes": bytes,
                         "predicted": predicted})  # fmt: skip
    return rows


def _show(console: Console, rows: list[dict[str, object]], ranks: int, hidden: int, top_k: int) -> None:
    console.print(
        f"[bold]expert parallelism[/] · {ranks} processes · hidden {hidden}, top {top_k} · FP8 there, bf16 back"
    )
    table = report.bare_table()
    for name in ("tokens", "phase", "gloo, this machine", "", "GB/s"):
        table.add_column(name, justify="right" if name != "phase" else "left")
    for name in BESIDE:
        table.add_column(name, justify="right")
    for row in rows:
        seconds, spread = float(row["seconds"]), float(row["spread"])  # type: ignore[arg-type]
        noisy = Text(f"±{spread:.0%}", "bold red" if spread > report.NOISY else "dim")
        predicted = row["predicted"]
        assert isinstance(predicted, dict)
        cells = [Text(report.duration(predicted[name]), "yellow") for name in BESIDE]
        rate = float(row["bytes"]) / seconds / 1e9  # type: ignore[arg-type]
        table.add_row(str(row["tokens"]), str(row["phase"]), Text(report.duration(seconds), "bold green"), noisy,
                      f"{rate:.2f}", *cells)  # fmt: skip
    report.show(console, table)
    console.print(
        "[dim]Green: measured, median of the slowest rank. Yellow: predicted for as many ranks, by constants fitted on "
        "DeepEP's rows of the H800 and others' of the 910C.",
        highlight=False,
    )
