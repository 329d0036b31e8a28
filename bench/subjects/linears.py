"""One op on linear layers, in this machine: a table for each layer."""

from __future__ import annotations

import report
from peers.linear import Peer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from suites import Linear
from timing import compete, machine, problems
from timing.compete import Effort, Row
from timing.stock import Stock

import moekern


class Bench:
    """The cases of one run, one table for each linear layer."""

    def __init__(
        self, console: Console, ops: list[str], linears: tuple[Linear, ...], m: tuple[int, ...], activations: list[str]
    ) -> None:
        self.console, self.ops, self.linears, self.m, self.activations = console, ops, linears, m, activations
        rows = max([*m, *(linear.n for linear in linears if set(ops) & set(problems.OF_WEIGHTS))])
        largest = max(max(linear.n, 2 * rows) * linear.k for linear in linears)  # silu_mul reads [rows, 2 k]
        self.stock = Stock(machine.cold_bytes(), largest)
        self.rows: list[Row] = []
        self.notes: list[str] = []

    def run(self, kernel: str | None, peers: list[type[Peer]], effort: Effort) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        cases = [(op, linear, self._rows_of(op, linear)) for op in self.ops for linear in self.linears]
        # Drawn between measurements only: a refreshing thread would take part in every sample.
        shown = self.console.is_terminal
        with Progress(
            *columns, console=self.console, transient=True, auto_refresh=False, disable=not shown
        ) as progress:
            task = progress.add_task("", total=sum(len(rows) for *_, rows in cases))
            for op, linear, rows in cases:
                found = self._linear(op, linear, rows, kernel, peers, effort, progress, task)
                if found:
                    size = f"{linear.n * linear.k / 1e6:.1f} MB of weights"
                    title = f"{op} · {linear.name} · N {linear.n} × K {linear.k} · {size}"
                    self.console.print()
                    self.console.print(f"[bold]{title}", highlight=False)
                    report.show(self.console, report.rows_table(found))
                    self.rows += found

    def _rows_of(self, op: str, linear: Linear) -> tuple[int, ...]:
        return (linear.n,) if op in problems.OF_WEIGHTS else self.m

    def _linear(
        self,
        op: str,
        linear: Linear,
        rows: tuple[int, ...],
        kernel: str | None,
        peers: list[type[Peer]],
        effort: Effort,
        progress: Progress,
        task: TaskID,
    ) -> list[Row]:
        found: list[Row] = []
        made: list[Peer] = []
        if op == "fp8_gemm_nt":
            weights = self.stock.weights(linear.n, linear.k)
            memory = machine.memory_budget()
            made = compete.make_peers(peers, weights.items[0], self.stock.cold, memory, self.notes, linear.name)
        for m in rows:
            progress.update(task, description=f"{op} {linear.name} M={m}", refresh=True)
            if op == "fp8_gemm_nt":
                group = [problems.gemm(weights, m, kind) for kind in self.activations]
                for peer in made:
                    peer.bind(problems.plain_activations(group[0]))
            elif op == "dequantize":
                group = [problems.dequantize(self.stock, m, linear.k)]
            else:
                group = [problems.cast(getattr(moekern, op), self.stock, m, linear.k)]
            found += compete.compete(self.stock, linear.name, group, kernel, made, effort, self.notes)
            progress.advance(task)
        return found
