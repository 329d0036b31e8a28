"""What a run prints, writes and draws."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from compete import Row
from machine import headline
from measure import Samples
from peers import PEERS
from rich.console import Console
from rich.table import Table
from rich.text import Text

SHORT = {peer.name: peer.name.replace("torch-", "").replace("onnxruntime-", "ort-") for peer in PEERS}


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 100 * scale else f"{seconds / scale:.0f} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def spread(samples: Samples) -> str:
    if len(samples.seconds) == 1:
        return "once"
    return f"±{100 * samples.mad / samples.median:.1f}%"


def _fraction(fraction: float) -> Text:
    style = "bold green" if fraction >= 0.85 else "yellow" if fraction >= 0.6 else "red"
    return Text(f"{100 * fraction:.0f}%", style=style)


def _limit(row: Row) -> str:
    rate = row.limits["multiply_add" if row.binds == "fma" else row.binds] / 1e9
    return f"{rate:.0f} GFLOP/s" if row.binds == "fma" else f"{rate:.1f} GB/s {row.binds}"


def _ratio(ratio: float) -> Text:
    return Text(f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x", style="" if ratio >= 1 else "red")


def rows_table(title: str, rows: list[Row]) -> Table:
    """Rows of one linear layer: one line per number of rows, activations and kernel."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, padding=(0, 1))
    compute = any(row.flops for row in rows)
    for name, justify in (("M", "right"), ("A", "left"), ("kernel", "left"), ("time", "right"), ("", "right")):
        table.add_column(name, justify=justify, no_wrap=True)
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
            Text(spread(row.samples), style="dim"),
        ]
        if compute:
            cells.append(f"{row.gflops:.0f}" if row.gflops >= 10 else f"{row.gflops:.2g}")
        cells += [f"{row.gbps:.1f}", _fraction(row.fraction), Text(_limit(row), style="dim")]
        cells += [_ratio(row.ratio(name)) if name in row.peers else "" for name in peers]
        table.add_row(*cells)
        previous = m
    return table


def explain(console: Console, peers: list[str], absent: dict[str, str]) -> None:
    """The legend under the tables."""
    console.print(
        "[dim]A: activations (bf16 = W8A16, fp8 = W8A8). ±: median distance from the median. of limit: least time by "
        "the limit that binds, of this run, over the time. vs: times faster than the peer."
    )
    for peer in PEERS:
        if peer.name in peers:
            console.print(f"[dim]{SHORT[peer.name]}: {peer.name}, {peer.says}")
    for name, reason in absent.items():
        console.print(f"[dim]{name}: not here, {reason}")


def write_json(path: Path, machine: dict[str, Any], settings: dict[str, Any], sections: dict[str, Any]) -> None:
    path.write_text(json.dumps({"machine": machine, "settings": settings, **sections}, indent=1) + "\n")


def plot(path: Path, rows: list[Row], machine: dict[str, Any], title: str) -> None:
    """Roofline: what each call reaches against what the machine allows for its intensity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row.flops]
    if not rows:
        raise ValueError("--plot: the run has no op with floating-point operations to draw")
    figure, axes = pyplot.subplots(figsize=(10.5, 6.2), constrained_layout=True)
    read = statistics.median(row.limits["read"] for row in rows)
    peaks: dict[float, str] = {}
    by_isa: dict[str, list[float]] = {}
    for row in rows:
        by_isa.setdefault(row.kernel.split("_")[0].removeprefix("cpu."), []).append(row.limits["multiply_add"])
    for isa, values in by_isa.items():
        peaks[statistics.median(values)] = isa
    intensity = [row.flops / row.bytes for row in rows]
    low, high = min(intensity) / 1.6, max(intensity) * 1.6
    for peak, isa in sorted(peaks.items()):
        knee = peak / read
        points = [low, max(knee, low), max(high, knee * 1.6)]
        axes.plot(points, [min(read * x, peak) / 1e9 for x in points], color="black", linewidth=1.4, zorder=1)
        axes.annotate(
            f"{isa} multiply-add {peak / 1e9:.0f} GFLOP/s", (points[-1], peak / 1e9), ha="right", va="bottom",
            xytext=(0, 3), textcoords="offset points", fontsize=9,
        )
    axes.annotate(
        f"DRAM read {read / 1e9:.1f} GB/s", (low * 1.05, read * low * 1.05 / 1e9), rotation=0, va="bottom", ha="left",
        xytext=(-2, 12), textcoords="offset points", fontsize=9,
    )
    layers = list(dict.fromkeys((row.linear, row.shape["n"], row.shape["k"]) for row in rows))
    colours = pyplot.get_cmap("tab10")
    markers = {"bf16": "o", "fp8": "^"}
    for i, layer in enumerate(layers):
        for activations, marker in markers.items():
            mine = [r for r in rows if (r.linear, r.shape["n"], r.shape["k"]) == layer and r.activations == activations]
            if mine:
                axes.plot(
                    [r.flops / r.bytes for r in mine], [r.gflops for r in mine], marker, color=colours(i % 10),
                    markersize=7, alpha=0.85, markeredgewidth=0,
                    label=f"{layer[0]}  {layer[1]}×{layer[2]}, {activations}",
                )
    best: dict[tuple, tuple[float, float]] = {}
    for row in rows:
        for samples in row.peers.values():
            key = (row.linear, row.shape["m"])
            gflops = row.flops / samples.median / 1e9
            best[key] = max(best.get(key, (row.flops / row.bytes, 0.0)), (row.flops / row.bytes, gflops), key=lambda p: p[1])
    if best:
        axes.plot(*zip(*best.values(), strict=True), "x", color="grey", markersize=6, zorder=0, label="fastest peer, any format")
    tops: dict[int, list[tuple[float, float]]] = {}
    for row in rows:
        tops.setdefault(row.shape["m"], []).append((row.flops / row.bytes, row.gflops))
    for m, points in tops.items():
        x, y = statistics.median(p[0] for p in points), min(p[1] for p in points)
        axes.annotate(f"M={m}", (x, y), ha="center", va="top", xytext=(0, -9), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="intensity, operations per byte", ylabel="GFLOP/s")
    axes.set_title(f"{title}\n{headline(machine)}", fontsize=10, loc="left")
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
