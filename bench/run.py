"""Benchmarks: `python bench/run.py`. What is measured, what is predicted, and how, is in bench/README.md."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import commands
import outputs
import packages
import report
import suites
import typer
from options import console as new_console
from options import numbers, settle, words
from peers import choose
from peers.grouped import GROUPED_PEERS
from peers.linear import PEERS
from peers.moe import MOE_PEERS
from rich.console import Console
from subjects import engine, grouped, moe, overheads, routing
from subjects.linears import Bench
from timing import compete, machine, problems
from timing.compete import Effort, Row

from moekern.testing.moe_models import LAYERS

OP_NAMES = list(problems.OPS)  # of one linear layer; --op moe, grouped and routing are of whole sets of experts
ROUTING = {"routing": routing.OP_NAMES, **{name: [name] for name in routing.OP_NAMES}}
ALL_PEERS, QUICK_PEERS = "torch,onnxruntime", "torch-bf16,torch-fp32,torch-int8"
QUICK_MOE_PEERS, QUICK_GROUPED_PEERS = "torch-loop-bf16", "torch-mm-bf16"
MOE_LAYERS = "deepseek-v3,qwen3-30b-a3b,mixtral-like"
MODELS = "qwen3-30b-a3b"
BUSY = 0.5  # load, before this run adds its own
IN_ORDER = "options come behind the command"


def main(
    context: typer.Context,
    suite: Annotated[str, typer.Option(help=f"{', '.join(suites.names())}, or a JSON file like them")] = "deepseek-v3",
    op: Annotated[
        str, typer.Option(help=f"moe, grouped, routing, model, or ops, or all ops: {', '.join(OP_NAMES)}")
    ] = "fp8_gemm_nt",
    kernel: Annotated[str | None, typer.Option(help="all kernels whose name has this regular expression")] = None,
    m: Annotated[str | None, typer.Option(help="numbers of rows, separated by commas, instead of the suite's")] = None,
    activations: Annotated[str, typer.Option(help="bf16 (W8A16), fp8 (W8A8) or both")] = "bf16,fp8",
    peers: Annotated[str | None, typer.Option(help="names or families, separated by commas; none")] = None,
    quick: Annotated[bool, typer.Option("--quick/--full", help="3 minutes, or all rows, samples and peers")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads, for kernels and peers alike")] = None,
    overhead: Annotated[bool, typer.Option(help="also the cost of calls, of import, of running beside torch")] = True,
    groups: Annotated[int, typer.Option(min=1, help="of --op grouped: experts")] = grouped.GROUPS,
    layers: Annotated[str | None, typer.Option(help=f"of --op moe, routing and model: {', '.join(LAYERS)}")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="of --op moe: a layer of this checkpoint instead")] = None,
    layer: Annotated[int, typer.Option(min=0, help="which layer of it")] = 0,
    depth: Annotated[int, typer.Option(min=1, help="of --op model: layers of each model")] = 2,
    real: Annotated[bool, typer.Option("--real", help="instead: a real language model with FP8 layers")] = False,
    compare_devices: Annotated[
        str | None, typer.Option(help="devices beside each other, measured, predicted and published: h800,mi300x,this")
    ] = None,
    what: Annotated[str | None, typer.Option(help=f"a whole model, predicted: {', '.join(commands.MODELS)}")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="of --what: tokens on each rank")] = None,
    ep: Annotated[int, typer.Option(min=1, help="of --what: ranks that share the experts")] = commands.RANKS,
    sequence: Annotated[int, typer.Option(min=1, help="of --what: tokens of a sequence")] = commands.CONTEXT,
    html: Annotated[Path | None, typer.Option(help="write a page with everything here")] = None,
    json: Annotated[Path | None, typer.Option(help="write everything here")] = None,
    csv: Annotated[Path | None, typer.Option(help="write the rows of all tables here")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw the roofline, or the devices, here, as PNG")] = None,
) -> None:
    """Times FP8 kernels against this machine's limits, other libraries, other devices."""
    if context.invoked_subcommand:
        if given := [name for name in context.params if _given(context, name)]:
            raise typer.BadParameter(f"{context.invoked_subcommand}: {IN_ORDER}, not before it", param_hint=given[0])
        return
    console = new_console()
    settle(threads)
    started = time.perf_counter()
    facts = machine.describe()
    console.print(f"[bold]moekern bench[/] · {machine.headline(facts)}", highlight=False)
    result: dict[str, Any] = {"machine": facts, "settings": context.params, "notes": []}
    targets = outputs.Targets(html, json, csv, plot)
    try:
        targets.check()
        if what:
            commands.whole_model(console, result, what, compare_devices, tokens, ep, sequence)
        elif compare_devices:
            commands.compare(console, result, compare_devices, suite, numbers("--m", m) if m else None, quick)
        else:
            if facts["load"] > BUSY:
                console.print(f"[yellow]The machine is busy (load {facts['load']}): expect a wide spread.")
            measure(console, result, suite, op, kernel, m, activations, peers, quick, overhead, groups, layers,
                    checkpoint, layer, depth, real)  # fmt: skip
            if html:
                commands.beside(result, suite)
        targets.write(console, result)
    except (ValueError, packages.Missing) as error:
        raise typer.BadParameter(str(error)) from None
    for note in result["notes"]:
        console.print(f"[red]{note}", highlight=False)
    console.print(f"[dim]{time.perf_counter() - started:.0f} s")
    if any(note.startswith(compete.WRONG) for note in result["notes"]):
        raise typer.Exit(1)


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def measure(
    console: Console, result: dict[str, Any], suite: str, op: str, kernel: str | None, m: str | None, activations: str,
    peers: str | None, quick: bool, overhead: bool, groups: int, layers: str | None, checkpoint: Path | None,
    layer: int, depth: int, real: bool,
) -> None:  # fmt: skip
    """What runs here. Rows, notes and whatever else there is go into the result."""
    table = suites.load(suite)
    if real:
        from subjects import real_model

        result["real"] = real_model.run(console, quick)
        return
    kinds = words("--activations", activations, ["bf16", "fp8"])
    effort = Effort(0.25, 9) if quick else Effort(1.0, 25)
    rows: list[Row] = []
    absent: dict[str, str] = {}
    if op == "moe":
        chosen, absent = choose(peers or (QUICK_MOE_PEERS if quick else ALL_PEERS), MOE_PEERS)
        names = words("--layers", layers or MOE_LAYERS, list(LAYERS))
        weights = [moe.mapped(checkpoint, layer)] if checkpoint else moe.load(names)
        count = numbers("--m", m) if m else moe.QUICK_TOKENS if quick else moe.TOKENS
        thorough = effort if quick else Effort(2.0, 25)
        rows, notes = moe.run(console, weights, count, kinds, kernel, chosen, thorough)
    elif op == "grouped":
        chosen, absent = choose(peers or (QUICK_GROUPED_PEERS if quick else "torch"), GROUPED_PEERS)
        experts = tuple(linear for linear in table.linears if linear.expert)
        if not experts:
            raise typer.BadParameter(f"{suite}: it has no experts", param_hint="--suite")
        of_all = numbers("--m", m) if m else grouped.QUICK_ROWS if quick else grouped.ROWS
        rows, notes = grouped.run(console, experts, groups, of_all, kinds, kernel, chosen, effort)
    elif op == "model":
        names = words("--layers", layers or MODELS, list(engine.CONFIGS))
        prompts = numbers("--m", m) if m else engine.QUICK_PREFILL if quick else engine.PREFILL
        slices, notes = engine.run(console, names, depth, prompts, Effort(1.0, 9) if quick else Effort(4.0, 25))
        result["slices"] = [found.to_json() for found in slices]
    elif op in ROUTING:
        chosen, absent = choose(peers or "torch", routing.ROUTING_PEERS)
        count = numbers("--m", m) if m else routing.QUICK_TOKENS if quick else routing.TOKENS
        names = words("--layers", layers or MOE_LAYERS, list(LAYERS))
        rows, notes = routing.run(console, ROUTING[op], names, count, kinds, kernel, chosen, effort)
    else:
        chosen, absent = choose(peers or (QUICK_PEERS if quick else ALL_PEERS), PEERS)
        ops = OP_NAMES if op == "all" else words("--op", op, OP_NAMES)
        count = numbers("--m", m) if m else table.quick_m if quick else table.m
        bench = Bench(console, ops, table.linears, count, kinds)
        bench.run(kernel, chosen, effort)
        rows, notes = bench.rows, bench.notes
        if not rows and not notes:
            raise typer.BadParameter(f"{kernel}: no kernel of that name accepts any case", param_hint="--kernel")
    if rows:
        report.legend(console, rows, absent)
    if overhead and kernel is None and op in (*OP_NAMES, "all"):
        result["overheads"], more = overheads.run(console, bench.stock, effort, quick)
        notes = [*notes, *more]
    result["rows"] = rows
    result["title"] = f"{op} · {table.model}"
    result["notes"] += notes


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.callback(invoke_without_command=True)(main)
commands.register(app)

if __name__ == "__main__":
    app()
