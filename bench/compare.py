"""Compares results of run.py: `python bench/compare.py before.json after.json --threshold 5%`.

With one result it is compared with the last release's record of the same class of machines (history/). What is
compared is the share of the limit that binds and the ratio to every peer, each of its own run: a machine that was
slower that day slows its limits and the peers too. A case is worse if its share is, by more than the threshold and by
more than chance explains; a noisy case is never. The peers' column tells a kernel that lost from a limit that gained.
Exits with 1 if a case got worse.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Annotated, Any

import history
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 140  # where the output is no terminal
SIGMAS = 2.0  # of the difference of two medians: what chance explains 19 times in 20


def _threshold(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise typer.BadParameter(f"{text}: neither 5% nor 0.05") from None
    if not 0 <= value < 1:
        raise typer.BadParameter(f"{text}: it is between 0 and 100%")
    return value


def _load(path: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        result["machine"]["identity"], result["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise typer.BadParameter(f"{path}: not a result of run.py ({type(error).__name__}: {error})") from None
    return result


def _cases(result: dict[str, Any]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Rows by what was computed. The dispatcher's choice is one case, whichever kernel it is."""
    cases = {}
    for row in result["results"]:
        kernel = "chosen" if row["selected"] else row["kernel"]
        cases[row["op"], row["linear"], row["m"], row["n"], row.get("k"), row["activations"], kernel] = row
    return cases


def _verdict(ratio: float, chance: float, threshold: float) -> Text:
    if ratio < 1 - threshold:
        return Text("worse", style="bold red") if ratio < 1 - chance else Text("worse, by chance?", style="yellow")
    if ratio > 1 + threshold:
        return Text("better", style="green") if ratio > 1 + chance else Text("better, by chance?", style="dim")
    return Text("same", style="dim")


def against_peers(before: dict[str, Any], after: dict[str, Any]) -> float | None:
    """The change of the ratio to the peers that both runs have, in the middle; None where there are none."""
    common = before["peers"].keys() & after["peers"].keys()
    changes = [after["peers"][name]["ratio"] / before["peers"][name]["ratio"] for name in common]
    return statistics.median(changes) if changes else None


def _same_machines(old: dict[str, Any], new: dict[str, Any], console: Console) -> bool:
    here, there = old["machine"]["identity"], new["machine"]["identity"]
    if "class" in old and old["class"] == history.machine_class(there):
        return True
    differing = [key for key in here if here[key] != there.get(key)]
    for key in differing:
        console.print(f"{key}: {here[key]} against {there.get(key)}", highlight=False)
    return not differing


def main(
    files: Annotated[list[Path], typer.Argument(help="JSON of run.py, and before it the JSON of an earlier run")],
    threshold: Annotated[str, typer.Option(help="how much worse is a regression")] = "5%",
    force: Annotated[bool, typer.Option("--force", help="compare results of different machines")] = False,
    report_only: Annotated[bool, typer.Option("--report", help="exit with 0 whatever got worse")] = False,
) -> None:
    """Exit status 0: nothing got worse. 1: something did. 2: the results cannot be compared."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    allowed = _threshold(threshold)
    if len(files) > 2:
        raise typer.BadParameter(f"{len(files)} files: it is one result, or two")
    new = _load(files[-1])
    found = _load(files[0]) if len(files) == 2 else history.latest(new["machine"]["identity"])
    if found is None:
        console.print(f"No release has a record on {history.machine_class(new['machine']['identity'])}.")
        return
    old = found
    if len(files) == 1:
        console.print(f"against release {old['release']} on {old['class']}", highlight=False)
    if not _same_machines(old, new, console) and not force:
        console.print("[red]The results are from different machines; --force compares them all the same.")
        raise typer.Exit(2)
    worse = _show(console, old, new, allowed, threshold)
    if worse and not report_only:
        raise typer.Exit(1)


def _show(console: Console, old: dict[str, Any], new: dict[str, Any], allowed: float, threshold: str) -> int:
    """The table; how many cases got worse."""
    left, right = _cases(old), _cases(new)
    common = [key for key in left if key in right]
    if not common:
        console.print("[red]The results have no case in common.")
        raise typer.Exit(2)
    table = Table(box=None, header_style="dim", padding=(0, 1))
    for name in ("op", "linear"):
        table.add_column(name, no_wrap=True)
    for name in ("M", "A"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("kernel", no_wrap=True)
    for name in ("of limit", "after", "ratio", "vs peers"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    worse, ratios = 0, []
    for key in common:
        a, b = left[key], right[key]
        ratio, peers = b["fraction"] / a["fraction"], against_peers(a, b)
        chance = SIGMAS * math.hypot(a["time"]["uncertainty"], b["time"]["uncertainty"])
        ratios.append(ratio)
        verdict = _verdict(ratio, chance, allowed)
        if b["time"].get("noisy"):
            verdict = Text(f"noisy ({verdict.plain})", style="yellow")
        worse += verdict.plain == "worse"
        kernels = dict.fromkeys(row["kernel"].removeprefix("cpu.") for row in (a, b))
        shares = [f"{100 * row['fraction']:.0f}%" for row in (a, b)]
        table.add_row(
            key[0], key[1], str(key[2]), key[5], " -> ".join(kernels), *shares, f"{ratio:.3f}",
            "" if peers is None else f"{peers:.3f}", verdict,
        )  # fmt: skip
    console.print(table)
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    console.print(
        f"{len(common)} cases, geometric mean {mean:.3f}; {worse} worse by more than {threshold}; "
        f"only before: {len(left) - len(common)}, only after: {len(right) - len(common)}"
    )
    return worse


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(main)

if __name__ == "__main__":
    app()
