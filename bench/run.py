"""Benchmarks: `python bench/run.py --quick`. What is measured, and how, is in bench/README.md."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import compete
import engine
import exported
import grouped
import machine
import moe
import overheads
import packages
import problems
import report
import routing
import suites
import torch
import typer
from compete import Effort, Row
from grouped_peers import GROUPED_PEERS
from moe_peers import MOE_PEERS
from peers import PEERS, Peer, choose
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from stock import Stock
from suites import Linear

import moekern
from moekern.testing.moe_models import LAYERS

OP_NAMES = list(problems.OPS)  # of one linear layer; --op moe, grouped and routing are of whole sets of experts
ROUTING = {"routing": routing.OP_NAMES, **{name: [name] for name in routing.OP_NAMES}}
ALL_PEERS, QUICK_PEERS = "torch,onnxruntime", "torch-bf16,torch-fp32,torch-int8"
QUICK_MOE_PEERS, QUICK_GROUPED_PEERS = "torch-loop-bf16", "torch-mm-bf16"
MOE_LAYERS = "deepseek-v3,qwen3-30b-a3b,mixtral-like"
MODELS = "qwen3-30b-a3b"
WIDTH = 118  # of the tables where the output is no terminal
BUSY = 0.5  # load, before this run adds its own


def _words(option: str, text: str, allowed: list[str]) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if wrong := [word for word in words if word not in allowed]:
        raise typer.BadParameter(f"{', '.join(wrong)}: not among {', '.join(allowed)}", param_hint=option)
    return words


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(word) for word in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text}: not a list of numbers", param_hint=option) from None
    if min(numbers) < 1:
        raise typer.BadParameter(f"{text}: every number is at least 1", param_hint=option)
    return numbers


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


def main(
    context: typer.Context,
    what: Annotated[str | None, typer.Argument(help="onnx: exported layers in onnxruntime, beside kernels")] = None,
    suite: Annotated[str, typer.Option(help=f"{', '.join(suites.names())}, or a JSON file like them")] = "deepseek-v3",
    op: Annotated[
        str, typer.Option(help=f"moe, grouped, routing, model, or ops, or all ops: {', '.join(OP_NAMES)}")
    ] = "fp8_gemm_nt",
    kernel: Annotated[str | None, typer.Option(help="all kernels whose name has this regular expression")] = None,
    m: Annotated[str | None, typer.Option(help="numbers of rows, separated by commas, instead of the suite's")] = None,
    activations: Annotated[str, typer.Option(help="bf16 (W8A16), fp8 (W8A8) or both")] = "bf16,fp8",
    peers: Annotated[str | None, typer.Option(help="names or families, separated by commas; none")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="under 3 minutes: fewer rows, samples and peers")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads, for kernels and peers alike")] = None,
    overhead: Annotated[bool, typer.Option(help="also the cost of calls, of import, of running beside torch")] = True,
    groups: Annotated[int, typer.Option(min=1, help="of --op grouped: experts")] = grouped.GROUPS,
    layers: Annotated[str | None, typer.Option(help=f"of --op moe, routing and model: {', '.join(LAYERS)}")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="of --op moe: a layer of this checkpoint instead")] = None,
    layer: Annotated[int, typer.Option(min=0, help="which layer of it")] = 0,
    depth: Annotated[int, typer.Option(min=1, help="of --op model: layers of each model")] = 2,
    real: Annotated[bool, typer.Option("--real", help="instead: a real language model with FP8 layers")] = False,
    json: Annotated[Path | None, typer.Option(help="write everything here")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw the roofline here, as PNG")] = None,
) -> None:
    """Times FP8 kernels against this machine's limits and against what else one could call."""
    if what not in (None, "onnx"):
        raise typer.BadParameter(f"{what}: it is onnx, or nothing", param_hint="what")
    try:
        table = suites.load(suite)
        if op == "moe":
            moe_peers, absent = choose(peers or (QUICK_MOE_PEERS if quick else ALL_PEERS), MOE_PEERS)
        elif op == "grouped":
            wanted = peers or (QUICK_GROUPED_PEERS if quick else "torch")
            grouped_peers, absent = choose(wanted, GROUPED_PEERS)
        elif op in ROUTING:
            routing_peers, absent = choose(peers or "torch", routing.ROUTING_PEERS)
        else:
            chosen, absent = choose(peers or (QUICK_PEERS if quick else ALL_PEERS), PEERS)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    named = {"all": OP_NAMES, "moe": [], "grouped": [], "model": [], **ROUTING}
    ops = named[op] if op in named else _words("--op", op, OP_NAMES)
    kinds = _words("--activations", activations, ["bf16", "fp8"])
    rows = _numbers("--m", m) if m else table.quick_m if quick else table.m

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    torch.set_num_threads(threads or torch.get_num_threads())
    started = time.perf_counter()
    facts = machine.describe()
    console.print(f"[bold]moekern bench[/] · {machine.headline(facts)}", highlight=False)
    if facts["load"] > BUSY:
        console.print(f"[yellow]The machine is busy (load {facts['load']}): expect a wide spread.")
    result: dict[str, Any] = {"machine": facts, "settings": context.params}
    notes: list[str] = []
    if real:
        import real_model

        try:
            result["real"] = real_model.run(console, quick)
        except packages.Missing as reason:
            raise typer.BadParameter(str(reason), param_hint="--real") from None
    elif what == "onnx":
        names = _words("--layers", layers or exported.LAYERS, list(LAYERS))
        tokens = _numbers("--m", m) if m else exported.QUICK_TOKENS if quick else exported.TOKENS
        try:
            result["onnx"], notes = exported.run(console, names, tokens, quick, Effort(2.0, 9))
        except packages.Missing as reason:
            raise typer.BadParameter(str(reason), param_hint="what") from None
    elif op == "moe":
        weights = (
            [moe.mapped(checkpoint, layer)]
            if checkpoint
            else moe.load(_words("--layers", layers or MOE_LAYERS, list(LAYERS)))
        )
        tokens = _numbers("--m", m) if m else moe.QUICK_TOKENS if quick else moe.TOKENS
        effort = Effort(0.25, 9) if quick else Effort(2.0, 25)
        found, notes = moe.run(console, weights, tokens, kinds, kernel, moe_peers, effort)
        result["results"] = [row.to_json() for row in found]
        report.legend(console, found, absent)
    elif op == "grouped":
        experts = tuple(linear for linear in table.linears if linear.expert)
        if not experts:
            raise typer.BadParameter(f"{suite}: it has no experts", param_hint="--suite")
        of_all = _numbers("--m", m) if m else grouped.QUICK_ROWS if quick else grouped.ROWS
        effort = Effort(0.25, 9) if quick else Effort(1.0, 25)
        found, notes = grouped.run(console, experts, groups, of_all, kinds, kernel, grouped_peers, effort)
        result["results"] = [row.to_json() for row in found]
        report.legend(console, found, absent)
    elif op == "model":
        names = _words("--layers", layers or MODELS, list(engine.CONFIGS))
        prompts = _numbers("--m", m) if m else engine.QUICK_PREFILL if quick else engine.PREFILL
        try:
            slices, notes = engine.run(console, names, depth, prompts, Effort(1.0, 9) if quick else Effort(4.0, 25))
        except packages.Missing as reason:
            raise typer.BadParameter(str(reason), param_hint="--op") from None
        result["results"] = [found.to_json() for found in slices]
    elif op in ROUTING:
        tokens = _numbers("--m", m) if m else routing.QUICK_TOKENS if quick else routing.TOKENS
        effort = Effort(0.25, 9) if quick else Effort(1.0, 25)
        layer_names = _words("--layers", layers or MOE_LAYERS, list(LAYERS))
        found, notes = routing.run(console, ops, layer_names, tokens, kinds, kernel, routing_peers, effort)
        result["results"] = [row.to_json() for row in found]
        report.legend(console, found, absent)
    else:
        bench = Bench(console, ops, table.linears, rows, kinds)
        effort = Effort(0.25, 9) if quick else Effort(1.0, 25)
        bench.run(kernel, chosen, effort)
        result["results"] = [row.to_json() for row in bench.rows]
        notes += bench.notes
        if bench.rows:
            report.legend(console, bench.rows, absent)
        elif not notes:
            raise typer.BadParameter(f"{kernel}: no kernel of that name accepts any case", param_hint="--kernel")
        if overhead and kernel is None:
            result["overheads"], more = overheads.run(console, bench.stock, effort, quick)
            notes += more
        if plot:
            report.plot(plot, bench.rows, facts, f"fp8_gemm_nt · {table.model}")
            console.print(f"roofline: {plot}")
    for note in notes:
        console.print(f"[red]{note}", highlight=False)
    if json:
        report.write_json(json, result | {"notes": notes})
        console.print(f"results: {json}")
    console.print(f"[dim]{time.perf_counter() - started:.0f} s")
    if any(note.startswith(compete.WRONG) for note in notes):
        raise typer.Exit(1)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(main)

if __name__ == "__main__":
    app()
