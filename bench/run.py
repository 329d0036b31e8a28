"""Benchmarks: `python bench/run.py`. What is measured, what is predicted, and how, is in bench/README.md."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import commands
import devices
import outputs
import packages
import suites
import typer
from measuring import OP_NAMES, Wanted, measure
from options import console as new_console
from options import numbers, settle
from subjects import grouped
from timing import compete, machine

from moekern.testing.moe_models import LAYERS

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
        suites.load(suite)
        devices.named(compare_devices or devices.THIS)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if facts["load"] > BUSY and (compare_devices is None or devices.THIS in compare_devices) and not what:
        console.print(f"[yellow]The machine is busy (load {facts['load']}): expect a wide spread.")
    try:
        if what:
            commands.whole_model(console, result, what, compare_devices, tokens, ep, sequence)
        elif compare_devices:
            commands.compare(console, result, compare_devices, suite, numbers("--m", m) if m else None, quick)
        elif real:
            from subjects import real_model

            result["real"] = real_model.run(console, quick)
        else:
            wanted = Wanted(suite, op, kernel, m, activations, peers, quick, overhead, groups, layers, checkpoint,
                            layer, depth)  # fmt: skip
            measure(console, result, wanted)
            if html:
                commands.beside(result, suite)
        targets.write(console, result)
    except (outputs.Nothing, packages.Missing) as reason:
        raise typer.BadParameter(str(reason)) from None
    for note in result["notes"]:
        console.print(f"[red]{note}", highlight=False)
    console.print(f"[dim]{time.perf_counter() - started:.0f} s")
    if any(note.startswith(compete.WRONG) for note in result["notes"]):
        raise typer.Exit(1)


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.callback(invoke_without_command=True)(main)
commands.register(app)

if __name__ == "__main__":
    app()
