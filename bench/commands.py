"""What run.py does besides measuring: devices beside each other, whole models, and its commands."""

from __future__ import annotations

import json as json_format
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import comparison
import devices
import history
import packages
import report
import suites
import typer
import whole_model as model_runs
from devices import THIS, Device
from model import fit
from model.constants import PATH
from model.layers import MODELS
from options import console as new_console
from options import numbers, settle, words
from rich.console import Console
from subjects import exported
from subjects.linears import Bench
from timing import accelerator, machine
from timing.compete import Effort, Row
from whole_model import CONTEXT, RANKS

from moekern.testing.moe_models import LAYERS

__all__ = ["CONTEXT", "MODELS", "RANKS"]
MOST_ROWS = 128  # that this CPU is timed with beside other devices: 4096 take a minute
QUICK = Effort(0.25, 9)


def compare(
    console: Console, result: dict[str, Any], names: str, suite: str, m: tuple[int, ...] | None, quick: bool
) -> None:
    """Tables of a suite's layers on the named devices; what this machine is among them is timed first."""
    table = suites.load(suite)
    chosen = devices.named(names)
    rows = m or comparison.ROWS
    this: Device | None = None
    measured: list[Row] = []
    model = _model_here()
    if THIS in chosen or model in chosen:
        this, measured, notes = _measure_this(console, table, rows, quick)
        result["notes"] += notes
    found = comparison.entries(chosen, table.linears, rows, this, measured, model)
    for linear in table.linears:
        console.print()
        console.print(f"[bold]{linear.name}[/] · N {linear.n} × K {linear.k}", highlight=False)
        report.show(console, comparison.table([entry for entry in found if entry.linear is linear]))
    comparison.legend(found, lambda text: console.print(f"[dim]{text}", highlight=False))
    if any(row.samples.noisy for row in measured):
        console.print("[bold red]Some measured times are noisy: a neighbour was on the cores. See --json for which.")
    result["rows"], result["entries"] = measured, found
    result["title"] = f"fp8_gemm_nt · {table.model}"


def _model_here() -> str | None:
    """The known device that is here."""
    known = (devices.by_title(device.name) for _, device in accelerator.found())
    return next((device.name for device in known if device), None)


def _measure_this(
    console: Console, table: suites.Suite, rows: tuple[int, ...], quick: bool
) -> tuple[Device, list[Row], list[str]]:
    """The accelerator that is here, or else the CPU, with limits of this run."""
    effort = QUICK if quick else Effort(1.0, 25)
    notes: list[str] = []
    for where, device in accelerator.found():
        known = devices.by_title(device.name)
        if known:
            found, more = accelerator.run(where, device, table.linears, rows, effort)
            # Its published figures: constants are shares of these. The limits of this run are in the rows.
            return replace(known, name=THIS, title=f"{device.name}, this machine"), found, more
        notes.append(f"{device.name}: no such device in data/devices.json, so the CPU is timed instead")
    timed = Bench(console, ["fp8_gemm_nt"], table.linears, _affordable(rows), ["fp8"])
    timed.run(None, [], effort)
    return cpu(timed.rows), timed.rows, [*notes, *timed.notes]


def _affordable(rows: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(m for m in rows if m <= MOST_ROWS) or (min(rows),)


def _limits(rows: list[Row]) -> tuple[float, float]:
    """Operations and bytes a second, over all comparisons of a run."""
    operations, bytes = (statistics.median(row.limits[name] for row in rows) for name in ("multiply_add", "read"))
    return operations, bytes


def cpu(rows: list[Row]) -> Device:
    facts = machine.describe()["identity"]
    memory = machine.memory_budget() * 2
    core = f"{facts['arch']} {facts['family_model']}"
    return devices.measured(facts["cpu"], core, *_limits(rows), memory, facts["cores"])


def beside(result: dict[str, Any], suite: str) -> None:
    """For the page of a run that measured this CPU: its rows beside the devices that are usually asked for."""
    rows = [row for row in result.get("rows", []) if row.op == "fp8_gemm_nt"]
    if not rows:
        return
    table = suites.load(suite)
    count = tuple(sorted({row.shape["m"] for row in rows} | set(comparison.ROWS)))
    names = devices.named(comparison.DEVICES)
    result["entries"] = comparison.entries(names, table.linears, count, cpu(rows), rows)


def whole_model(
    console: Console, result: dict[str, Any], what: str, names: str | None, tokens: int | None, ep: int, sequence: int
) -> None:
    words("--what", what, list(MODELS))
    chosen = [name for name in devices.named(names or comparison.DEVICES) if name != THIS or names]
    this: Device | None = None
    table = suites.load("deepseek-v3")
    if THIS in chosen:
        this, _, notes = _measure_this(console, replace(table, linears=table.linears[:1]), (1, 128), True)
        result["notes"] += notes
    found = model_runs.runs(chosen, this, what, tokens, ep, sequence)
    model_runs.show(console, found, what)
    result["model"] = found
    result["entries"] = comparison.entries(chosen, table.linears, comparison.ROWS, this, [])
    result["title"] = MODELS[what].title


def register(app: typer.Typer) -> None:
    for command in (onnx, ep, accuracy, record, refit):
        app.command(name="fit" if command is refit else command.__name__)(command)


def onnx(
    layers: Annotated[str, typer.Option(help=f"any of {', '.join(LAYERS)}")] = exported.LAYERS,
    m: Annotated[str | None, typer.Option(help="numbers of tokens, separated by commas")] = None,
    quick: Annotated[bool, typer.Option("--quick/--full", help="fewer tokens")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads, for kernels and peers alike")] = None,
    json: Annotated[Path | None, typer.Option(help="write everything here")] = None,
) -> None:
    """Exported layers in onnxruntime, beside kernels; and a model of 4 GB."""
    console = new_console()
    settle(threads)
    names = words("--layers", layers, list(LAYERS))
    count = numbers("--m", m) if m else exported.QUICK_TOKENS if quick else exported.TOKENS
    try:
        found, notes = exported.run(console, names, count, quick, Effort(2.0, 9))
    except packages.Missing as reason:
        raise typer.BadParameter(str(reason)) from None
    for note in notes:
        console.print(f"[red]{note}", highlight=False)
    if json:
        report.write_json(json, {"machine": machine.describe(), "onnx": found, "notes": notes})


def ep(
    tokens: Annotated[str, typer.Option(help="on each rank, separated by commas")] = "1,16,128,1024",
    hidden: Annotated[int, typer.Option(min=128)] = 7168,
    experts: Annotated[int, typer.Option(min=1, help="over all ranks")] = 256,
    top_k: Annotated[int, typer.Option(min=1)] = 8,
    json: Annotated[Path | None, typer.Option(help="write everything here")] = None,
) -> None:
    """Dispatch and combine among processes: torchrun --nproc-per-node 2 bench/run.py ep."""
    from subjects import expert_parallel

    try:
        expert_parallel.main(new_console(), numbers("--tokens", tokens), hidden, experts, top_k, json)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def accuracy(
    cross: Annotated[bool, typer.Option("--cross", help="also leave every shape out in turn: fits anew")] = False,
    rows: Annotated[bool, typer.Option("--rows", help="every row")] = False,
) -> None:
    """How well the model predicts published rows, those it was fitted on apart from those it was not."""
    import predictions

    predictions.show(new_console(), cross, rows)


def record(
    result: Annotated[Path, typer.Argument(help="JSON of a run, of a quiet machine")],
    release: Annotated[str, typer.Option(help="its version")],
) -> None:
    """Keeps the ratios of a run in bench/history, for later runs to be compared with."""
    try:
        typer.echo(history.write(json_format.loads(result.read_text()), release))
    except (OSError, KeyError, ValueError) as error:
        raise typer.BadParameter(f"{result}: {error}") from None


def refit() -> None:
    """The constants from published rows anew, into bench/model/constants.json."""
    if missing := packages.missing("fit", ("scipy",), "pip install 'moekern[bench]'"):
        raise typer.BadParameter(missing)
    started = time.perf_counter()
    PATH.write_text(json_format.dumps(fit.refit(), indent=1) + "\n")
    typer.echo(f"{PATH}: {time.perf_counter() - started:.0f} s")
