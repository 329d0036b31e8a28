"""What a run prints, writes and draws."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from peers.grouped import GROUPED_PEERS
from peers.linear import PEERS
from peers.moe import MOE_PEERS
from peers.routing import ROUTING_PEERS
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text
from timing.compete import Row
from timing.machine import headline
from timing.measure import NOISY, Samples

KNOWN = (*PEERS, *MOE_PEERS, *GROUPED_PEERS, *ROUTING_PEERS)
SHORT = {peer.name: peer.name.replace("torch-", "").replace("onnxruntime-", "ort-") for peer in KNOWN}


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            value = seconds / scale
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def spread(samples: Samples) -> Text:
    if len(samples.seconds) == 1:
        return Text("once", style="dim")
    text = f"±{100 * samples.mad / samples.median:.1f}%"
    return Text(f"noisy {text}", style="bold red") if samples.noisy else Text(text, style="dim")


def _fraction(fraction: float) -> Text:
    if fraction > 1.1:  # beyond chance and caches: usually a neighbour who slowed the limits alone
        style = "magenta"
    else:
        style = "bold green" if fraction >= 0.85 else "yellow" if fraction >= 0.6 else "red"
    return Text(f"{100 * fraction:.0f}%", style=style)


def _limit(row: Row) -> str:
    rate = row.limits["multiply_add" if row.binds == "fma" else row.binds] / 1e9
    return f"{rate:.0f} GFLOP/s" if row.binds == "fma" else f"{rate:.1f} GB/s {row.binds}"


def _ratio(ratio: float) -> Text:
    return Text(f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x", style="" if ratio >= 1 else "red")


def bare_table(title: str | None = None, **options: Any) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="dim",
        box=None,
        padding=(0, 1),
        **options,
    )


def show(console: Console, table: Table) -> None:
    """Every column whole: a table wider than the terminal runs on rather than losing digits."""
    width = console.width
    console.width = max(width, Measurement.get(console, console.options.update(width=1000), table).maximum)
    console.print(table)
    console.width = width


def rows_table(rows: list[Row]) -> Table:
    """Rows of one linear layer: one line per number of rows, activations and kernel."""
    table = bare_table()
    compute = any(row.flops for row in rows)
    for name in ("M", "A", "kernel", "time", ""):
        table.add_column(name, justify="left" if name in ("A", "kernel") else "right", no_wrap=True)
    if compute:
        table.add_column("GFLOP/s", justify="right", no_wrap=True)
    table.add_column("GB/s", justify="right", no_wrap=True)
    table.add_column("of limit", justify="right", no_wrap=True)
    table.add_column("limit, same run", justify="right", no_wrap=True)
    peers = list(dict.fromkeys(name for row in rows for name in row.peers))
    for name in peers:
        table.add_column(f"vs {SHORT[name]}", justify="right", no_wrap=True)
    previous = None
    for row in rows:
        m = row.shape["m"]
        cells: list[Any] = [
            str(m) if m != previous else "",
            row.activations,
            row.kernel.removeprefix("cpu."),
            duration(row.samples.median),
            spread(row.samples),
        ]
        if compute:
            cells.append(f"{row.gflops:.0f}" if row.gflops >= 10 else f"{row.gflops:.2g}")
        cells += [f"{row.gbps:.1f}", _fraction(row.fraction), Text(_limit(row), style="dim")]
        cells += [_ratio(row.ratio(name)) if name in row.peers else "" for name in peers]
        table.add_row(*cells)
        previous = m
    return table


SHARED = 2.0  # times: limits that differ by more within a run were taken with neighbours on the cores


def legend(console: Console, rows: list[Row], absent: dict[str, str]) -> None:
    """Under the tables: the run's limits with their range over its comparisons, and what the columns mean."""
    limits: dict[str, list[float]] = {}
    for row in rows:
        for name, rate in row.limits.items():
            what = f"{row.isa} multiply-add, GFLOP/s" if name == "multiply_add" else f"DRAM {name}, GB/s"
            limits.setdefault(what, []).append(rate / 1e9)
    ranges = (f"{what} {statistics.median(r):.1f} ({min(r):.1f} to {max(r):.1f})" for what, r in limits.items())
    console.print()
    console.print(f"Limits of this run: {'; '.join(ranges)}", highlight=False)
    if any(max(rates) > SHARED * min(rates) for rates in limits.values()):
        console.print(
            "[bold red]The limits changed twofold in this run: the machine is shared. Trust shares, not times."
        )
    if noisy := sum(row.samples.noisy for row in rows):
        console.print(
            f"[bold red]{noisy} of {len(rows)} rows are noisy: half of their samples lie more than {NOISY:.0%} from "
            "the median. Their times say little."
        )
    console.print(
        "[dim]A: activations (bf16 = W8A16, fp8 = W8A8, cast = bf16 rows that become FP8). ±: median distance from the "
        "median. of limit: least time by the limit that binds, of this run, over the time. vs: times faster than the "
        "peer."
    )
    present = {name for row in rows for name in row.peers}
    for peer in KNOWN:
        if peer.name in present:
            console.print(f"[dim]{SHORT[peer.name]}: {peer.name}, {peer.says}")
    for name, reason in absent.items():
        console.print(f"[dim]{name}: not here, {reason}")


def write_json(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=1, default=str) + "\n")


def plot(path: Path, rows: list[Row], machine: dict[str, Any], title: str) -> None:
    """Roofline: what each call reaches against what the machine allows for its intensity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    rows = [row for row in rows if row.flops]
    if not rows:
        raise ValueError("--plot: the run has no op with floating-point operations to draw")
    figure, axes = pyplot.subplots(figsize=(12, 6.2), constrained_layout=True)
    low, read = _roofs(axes, rows)
    layers = list(dict.fromkeys(_layer(row) for row in rows))
    colours = pyplot.get_cmap("tab10")
    for i, layer in enumerate(layers):
        for activations, marker in MARKERS.items():
            mine = [row for row in rows if _layer(row) == layer and row.activations == activations]
            if mine:
                axes.plot(
                    [row.flops / row.bytes for row in mine],
                    [row.gflops for row in mine],
                    marker,
                    color=colours(i % 10),
                    markersize=6,
                    alpha=0.8,
                    markeredgewidth=0,
                    label=f"{layer[0]}  {layer[1]} × {layer[2]}, {activations}",
                )
    fastest: dict[tuple[Any, ...], tuple[float, float]] = {}
    for row in rows:
        for samples in row.peers.values():
            here = (row.flops / row.bytes, row.flops / samples.median / 1e9)
            key = (*_layer(row), row.shape["m"])
            fastest[key] = max(fastest.get(key, here), here, key=lambda point: point[1])
    if fastest:
        x, y = zip(*fastest.values(), strict=True)
        axes.plot(x, y, "x", color="grey", markersize=6, zorder=0, label="fastest peer, any number format")
    columns: dict[int, list[Row]] = {}
    for row in rows:
        columns.setdefault(row.shape["m"], []).append(row)
    for m, column in columns.items():
        x_of_m = statistics.median(row.flops / row.bytes for row in column)
        axes.annotate(
            f"M={m}",
            (x_of_m, 0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
            color="dimgrey",
        )
    axes.set(xscale="log", yscale="log", xlabel="operations per byte that has to move", ylabel="GFLOP/s")
    axes.set_ylim(bottom=axes.get_ylim()[0] / 1.5)  # room for the M
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.set_minor_formatter(ticker.NullFormatter())
    axes.set_title(f"{title}\n{headline(machine)}", fontsize=10, loc="left")
    axes.grid(which="major", alpha=0.25)
    figure.legend(fontsize=8, loc="outside right upper", frameon=False)
    _label_slope(figure, axes, low, read)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


MARKERS = {"bf16": "o", "fp8": "^"}


def _layer(row: Row) -> tuple[str, int, int]:
    return row.linear, row.shape["n"], row.shape["k"]


def _roofs(axes: Any, rows: list[Row]) -> tuple[float, float]:
    """The DRAM slope and the multiply-add ceiling of every kernel that ran; where the slope begins, and its rate."""
    read = statistics.median(row.limits["read"] for row in rows)
    ceilings: dict[str, list[float]] = {}
    for row in rows:
        ceilings.setdefault(row.isa, []).append(row.limits["multiply_add"])
    intensity = [row.flops / row.bytes for row in rows]
    peaks = {isa: statistics.median(values) for isa, values in ceilings.items()}
    low, high = min(intensity) / 3, 2.5 * max(*intensity, *(peak / read for peak in peaks.values()))
    for isa, peak in peaks.items():
        points = [low, max(low, peak / read), high]
        axes.plot(points, [min(read * x, peak) / 1e9 for x in points], color="black", linewidth=1.3, zorder=1)
        axes.annotate(
            f"{isa} multiply-add, {peak / 1e9:.0f} GFLOP/s", (high, peak / 1e9), ha="right", va="bottom",
            xytext=(0, 3), textcoords="offset points", fontsize=9,
        )  # fmt: skip
    return low, read


def _label_slope(figure: Any, axes: Any, low: float, read: float) -> None:
    """Along the slope, whose angle on paper is known once everything else is drawn."""
    figure.draw_without_rendering()
    (x0, y0), (x1, y1) = axes.transData.transform([(low, read * low / 1e9), (2 * low, 2 * read * low / 1e9)])
    axes.annotate(
        f"DRAM read, {read / 1e9:.1f} GB/s", (low, read * low / 1e9), ha="left", va="bottom", fontsize=9,
        rotation=math.degrees(math.atan2(y1 - y0, x1 - x0)), rotation_mode="anchor", xytext=(2, 6),
        textcoords="offset points",
    )  # fmt: skip
