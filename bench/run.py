"""Benchmarks: `python bench/run.py --quick`. What is measured, and how, is in bench/README.md."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Annotated, Any

import compete
import machine
import overheads
import problems
import report
import suites
import torch
import typer
from compete import Effort, Row
from peers import Peer, choose
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from stock import Stock

import moekern
from moekern.ops import OPS

OP_NAMES = [op.name for op in OPS]
WIDTH = 118  # of the tables where the output is no terminal


def _list(option: str, text: str, allowed: list[str]) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if wrong := [word for word in words if word not in allowed]:
        raise typer.BadParameter(f"{', '.join(wrong)}: not among {', '.join(allowed)}", param_hint=option)
    return words


def _rows_of_m(text: str | None, suite: suites.Suite, quick: bool) -> tuple[int, ...]:
    if text is None:
        return suite.quick_m if quick else suite.m
    try:
        m = tuple(int(word) for word in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text}: not a list of numbers", param_hint="--m") from None
    if min(m) < 1:
        raise typer.BadParameter(f"{text}: every M is at least 1", param_hint="--m")
    return m


class Bench:
    """One run: what was asked for, what it found."""

    def __init__(self, console: Console, stock: Stock, effort: Effort, kernel: str | None) -> None:
        self.console, self.stock, self.effort, self.kernel = console, stock, effort, kernel
        self.rows: list[Row] = []
        self.notes: list[str] = []

    def linear(
        self,
        op: str,
        linear: suites.Linear,
        m: tuple[int, ...],
        activations: list[str],
        chosen: list[type[Peer]],
        progress: Progress,
        task: Any,
    ) -> None:
        found: list[Row] = []
        peers: list[Peer] = []
        if op == "fp8_gemm_nt":
            weights = self.stock.weights(linear.n, linear.k)
            memory = machine.memory_budget()
            peers = compete.make_peers(chosen, weights[0], self.stock.cold, memory, self.notes, linear.name)
        for rows in m if op not in problems.OF_WEIGHTS else (linear.n,):
            progress.update(task, description=f"{op} {linear.name} M={rows}", refresh=True)
            if op == "fp8_gemm_nt":
                group = [problems.gemm(weights, rows, kind) for kind in activations]
                for peer in peers:
                    peer.bind(problems.plain_activations(group[0]))
            elif op == "dequantize":
                group = [problems.dequantize(self.stock, rows, linear.k)]
            else:
                group = [problems.cast(getattr(moekern, op), self.stock, rows, linear.k)]
            found += compete.compete(self.stock, linear.name, group, self.kernel, peers, self.effort, self.notes)
            progress.advance(task)
        if found:
            size = f"{linear.n * linear.k / 1e6:.1f} MB of weights"
            title = f"{op} · {linear.name} · N {linear.n} × K {linear.k} · {size}"
            self.console.print()
            report.show(self.console, report.rows_table(title, found))
        self.rows += found


def main(
    suite: Annotated[str, typer.Option(help=f"{', '.join(suites.names())}, or a JSON file like them")] = "deepseek-v3",
    op: Annotated[str, typer.Option(help=f"ops, separated by commas, or all: {', '.join(OP_NAMES)}")] = "fp8_gemm_nt",
    kernel: Annotated[str | None, typer.Option(help="all kernels whose name has this regular expression")] = None,
    m: Annotated[str | None, typer.Option(help="numbers of rows, separated by commas, instead of the suite's")] = None,
    activations: Annotated[str, typer.Option(help="bf16 (W8A16), fp8 (W8A8) or both")] = "bf16,fp8",
    peers: Annotated[str | None, typer.Option(help="names or families, separated by commas; none")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="under 3 minutes: fewer rows, samples and peers")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads, for kernels and peers alike")] = None,
    overhead: Annotated[bool, typer.Option(help="also the cost of calls, of import, of running beside torch")] = True,
    real: Annotated[bool, typer.Option("--real", help="instead: a real language model with FP8 layers")] = False,
    json: Annotated[Path | None, typer.Option(help="write everything here")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw the roofline here, as PNG")] = None,
) -> None:
    """Times FP8 kernels against this machine's limits and against what else one could call."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    started = time.perf_counter()
    facts = machine.describe()
    console.print(f"[bold]moekern bench[/] · {machine.headline(facts)}", highlight=False)
    if facts["load"] > 0.5:
        console.print(f"[yellow]The machine is busy (load {facts['load']}): expect a wide spread.")
    sections: dict[str, Any] = {}
    failed = False
    if real:
        import real_model

        try:
            sections["real"] = real_model.run(console, quick)
        except real_model.Missing as reason:
            raise typer.BadParameter(str(reason), param_hint="--real") from None
    else:
        try:
            table = suites.load(suite)
            wanted = peers if peers is not None else QUICK_PEERS if quick else "torch,onnxruntime"
            chosen, absent = choose("" if wanted == "none" else wanted)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        ops = OP_NAMES if op == "all" else _list("--op", op, OP_NAMES)
        kinds = _list("--activations", activations, ["bf16", "fp8"])
        ms = _rows_of_m(m, table, quick)
        rows_at_most = max([*ms, *(x.n for x in table.linears if any(o in problems.OF_WEIGHTS for o in ops))])
        largest = max(max(x.n, 2 * rows_at_most) * x.k for x in table.linears)
        stock = Stock(machine.cold_bytes(), largest)
        bench = Bench(console, stock, Effort(0.25, 9) if quick else Effort(1.0, 25), kernel)
        steps = sum(len(table.linears) * (1 if o in problems.OF_WEIGHTS else len(ms)) for o in ops)
        with _progress(console, steps) as (progress, task):
            for name in ops:
                for linear in table.linears:
                    bench.linear(name, linear, ms, kinds, chosen if name == "fp8_gemm_nt" else [], progress, task)
        console.print()
        if bench.rows:
            report.limits_of(console, bench.rows)
        report.explain(console, [peer.name for peer in chosen], absent)
        if overhead and kernel is None:
            sections["overheads"], notes = overheads.run(console, stock, bench.effort, quick)
            bench.notes += notes
        for note in bench.notes:
            console.print(f"[red]{note}", highlight=False)
        failed = any(note.startswith("WRONG") for note in bench.notes)
        sections["results"] = [row.to_json() for row in bench.rows]
        sections["notes"] = bench.notes
        if plot:
            report.plot(plot, bench.rows, facts, f"fp8_gemm_nt · {table.model}")
            console.print(f"roofline: {plot}")
    settings = {"suite": suite, "op": op, "kernel": kernel, "m": m, "quick": quick, "real": real}
    if json:
        report.write_json(json, facts, settings, sections)
        console.print(f"results: {json}")
    console.print(f"[dim]{time.perf_counter() - started:.0f} s")
    if failed:
        raise typer.Exit(1)


QUICK_PEERS = "torch-bf16,torch-fp32,torch-int8"


@contextlib.contextmanager
def _progress(console: Console, steps: int) -> Any:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    # Drawn between measurements only: a refreshing thread would take part in every sample.
    shown = console.is_terminal
    with Progress(*columns, console=console, transient=True, auto_refresh=False, disable=not shown) as progress:
        yield progress, progress.add_task("", total=steps)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(main)

if __name__ == "__main__":
    app()
