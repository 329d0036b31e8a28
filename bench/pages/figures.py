"""Drawings of results. What is measured, published and predicted has an ink and a mark of its own in all of them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import predictions
import published
from comparison import Entry
from devices import known
from model import fit
from model.gemm import Product
from model.products import predict
from timing.compete import Row
from whole_model import Run

# Ink and mark: dark and solid for what a clock showed, an open diamond for what others printed, light for the model.
INK = {"measured": "#0b6e4f", "published": "#1d4ed8", "predicted": "#d97706"}
MARK = {"measured": "o", "published": "D", "predicted": "x"}
DEVICE_COLOURS = ("#374151", "#7c3aed", "#be123c", "#0891b2", "#65a30d", "#a16207", "#db2777", "#4b5563")
SIZE = (9.2, 5.2)


def _new(size: tuple[float, float] = SIZE, **options: Any) -> tuple[Any, Any]:
    """A figure with one pair of axes."""
    figure, grid = _grid(1, 1, size, **options)
    return figure, grid[0, 0]


def _grid(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    # Text stays text, so that a reader can search the page; ids do not depend on the run.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "moekern", "font.family": "DejaVu Sans"})
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(rows, columns, figsize=size, constrained_layout=True, squeeze=False)
    for axes in grid.flat:
        axes.grid(which="major", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set(**options)
        axes.minorticks_off()
    return figure, grid


def svg(figure: Any) -> str:
    """The drawing as an element for a page, without what only a file needs."""
    from matplotlib import pyplot

    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    text = out.getvalue()
    # A tenth of a point is what a screen shows: coordinates with six digits, and indents, are most of the page.
    paths = re.sub(r'\b(d|x|y)="[^"]*"', lambda found: re.sub(r"(\.\d)\d+", r"\1", found[0]), text)
    return re.sub(r"\n\s*", "\n", paths[paths.index("<svg") :]).replace("'DejaVu Sans'", "sans-serif")


def save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _colours(names: Iterable[str]) -> dict[str, str]:
    return {name: DEVICE_COLOURS[i % len(DEVICE_COLOURS)] for i, name in enumerate(dict.fromkeys(names))}


def _kinds(axes: Any) -> None:
    """The legend of the inks, in black: colours are of devices."""
    for kind, mark in MARK.items():
        axes.plot([], [], mark, color=INK[kind], label=kind, **_style(kind))


def _style(kind: str) -> dict[str, Any]:
    return {"markersize": 7 if kind == "measured" else 6, "fillstyle": "none" if kind == "published" else "full"}


def _seconds(entry: Entry) -> dict[str, float]:
    times = {"predicted": entry.predicted.seconds}
    times |= {"published": entry.published.seconds} if entry.published else {}
    times |= {"measured": entry.measured.samples.median} if entry.measured else {}
    return times


def roofline(entries: list[Entry]) -> Any:
    figure, axes = _new(xlabel="operations per byte", ylabel="operations per second", xscale="log", yscale="log")
    colours = _colours(entry.device.name for entry in entries)
    at = [_intensity(entry) for entry in entries]
    low, high = min(at) / 2, max(at) * 3
    for device in {entry.device.name: entry.device for entry in entries}.values():
        peak, memory = device.peak[device.eight_bit].value, device.bandwidth.value
        knee = peak / memory
        points = [low, knee, max(high, 2 * knee)]
        line = axes.plot(points, [min(memory * x, peak) for x in points], color=colours[device.name], linewidth=1.4,
                         label=f"{device.name}, {device.eight_bit}")  # fmt: skip
        line[0].set_gid(f"roof-{device.name}")
    for kind in MARK:
        points = [(_intensity(e), e.flops / _seconds(e)[kind]) for e in entries if kind in _seconds(e)]
        if points:
            drawn = axes.plot(*zip(*points, strict=True), MARK[kind], color=INK[kind], alpha=0.8, label=kind,
                              zorder=3 if kind == "measured" else 2, **_style(kind))  # fmt: skip
            drawn[0].set_gid(f"points-{kind}")
    axes.legend(frameon=False, fontsize=8, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def _intensity(entry: Entry) -> float:
    moved = entry.linear.n * entry.linear.k + entry.m * (entry.linear.k + 2 * entry.linear.n)
    return entry.flops / moved


DRAWN = 6  # layers, of which each has axes of its own


def _by_rows(entries: list[Entry], value: Callable[[Entry, float], float], **options: Any) -> Any:
    """Axes for every layer: lines as the model has them between the rows that are asked for, and marks at those."""
    layers = list(dict.fromkeys(entry.linear for entry in entries))[:DRAWN]
    columns = min(3, len(layers))
    deep = -(-len(layers) // columns)
    ylabel = options.pop("ylabel")
    figure, grid = _grid(deep, columns, (4.2 * columns, 0.6 + 3.2 * deep), xscale="log", **options)
    colours = _colours(entry.device.name for entry in entries)
    for axes, linear in zip(grid.flat, layers, strict=False):
        mine = [entry for entry in entries if entry.linear is linear]
        for name, colour in colours.items():
            _device_line(axes, [entry for entry in mine if entry.device.name == name], colour, value)
        axes.set_title(f"{linear.name}, N {linear.n} × K {linear.k}", fontsize=9, loc="left")
        axes.set_xlabel("rows M")
    for axes in grid.flat[len(layers) :]:
        axes.remove()
    for axes in grid[:, 0]:
        axes.set_ylabel(ylabel)
    _kinds(grid.flat[0])
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=len(labels), loc="outside upper center")
    return figure


def _device_line(axes: Any, mine: list[Entry], colour: str, value: Callable[[Entry, float], float]) -> None:
    if not mine:
        return
    first = mine[0]
    low, high = min(entry.m for entry in mine), max(entry.m for entry in mine)
    between = sorted({round(low * (high / low) ** (i / 48)) for i in range(49)})
    curve = []
    for m in between:
        seconds = predict(first.device, Product((m,), first.linear.n, first.linear.k)).seconds
        curve.append(value(replace(first, m=m), seconds))
    label = f"{first.device.name}, {first.dtype}"
    line = axes.plot(between, curve, "--", color=colour, linewidth=1.1, label=label)
    line[0].set_gid(f"line-{first.device.name}")
    for kind in MARK:
        points = [(entry.m, value(entry, _seconds(entry)[kind])) for entry in mine if kind in _seconds(entry)]
        if points:
            axes.plot(*zip(*points, strict=True), MARK[kind], color=INK[kind], zorder=3, **_style(kind))


def throughput(entries: list[Entry]) -> Any:
    return _by_rows(entries, lambda entry, seconds: entry.flops / seconds, yscale="log", ylabel="operations per second")


def share(entries: list[Entry]) -> Any:
    return _by_rows(
        entries, lambda entry, seconds: 100 * entry.of_peak(seconds), ylabel="% of the dense peak of its type"
    )


KIND_COLOURS = {
    "compute": "#92400e",
    "memory": "#d97706",
    "operands": "#f59e0b",
    "launch": "#fcd34d",
    "link": "#fb7185",
}


def steps(runs: list[Run]) -> Any:
    """A bar for every device and phase: attention and experts by what binds them, relative to its own sum."""
    present = [run for run in runs if run.found]
    figure, axes = _new(xlabel="% of a layer's time, predicted", size=(9.2, 0.8 + 0.42 * len(present)))
    for place, run in enumerate(reversed(present)):
        assert run.found
        all_steps = [*run.found.attention, *run.found.moe]
        whole, left = sum(step.seconds for step in all_steps), 0.0
        for step in sorted(all_steps, key=lambda step: list(KIND_COLOURS).index(step.kind)):
            width = 100 * step.seconds / whole
            axes.barh(place, width, left=left, color=KIND_COLOURS[step.kind], edgecolor="white", linewidth=0.4)
            if width > 7:
                ink = "white" if step.kind == "compute" else "black"
                axes.text(left + width / 2, place, step.name, ha="center", va="center", fontsize=7, color=ink)
            left += width
    axes.set_yticks(range(len(present)), [f"{run.device.name}, {run.phase}" for run in reversed(present)])
    for kind, colour in KIND_COLOURS.items():
        axes.barh([0], [0], color=colour, label=kind)
    axes.legend(frameon=False, fontsize=8, ncols=len(KIND_COLOURS), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def limits(rows: list[Row]) -> Any:
    """Measured shares of this machine's limits by M, and the fastest peer's on the same products."""
    figure, axes = _new(xscale="log", xlabel="rows M", ylabel="% of the limit that binds")
    products = [row for row in rows if row.flops]
    for activations, fill in (("bf16", "full"), ("fp8", "none")):
        mine = [row for row in products if row.activations == activations]
        if mine:
            axes.plot([row.shape["m"] for row in mine], [100 * row.fraction for row in mine], "o", fillstyle=fill,
                      color=INK["measured"], label=f"measured, activations {activations}")  # fmt: skip
    peers = [(row.shape["m"], 100 * row.fraction / max(row.ratio(p) for p in [min(row.peers, key=row.ratio)]))
             for row in products if row.peers]  # fmt: skip
    if peers:
        axes.plot(*zip(*peers, strict=True), "+", color="grey", label="the fastest peer, any number format")
    axes.axhline(100, color="black", linewidth=0.8)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    return figure


def accuracy() -> Any:
    figure, axes = _new(xscale="log", yscale="log", xlabel="published, µs", ylabel="predicted, µs", size=(6.4, 5.6))
    devices = sorted({row.device for row in published.gemms()} & set(known()))
    colours = _colours(devices)
    low, high = 1e9, 0.0
    for device in devices:
        checks = predictions.checks(device)
        for held in (False, True):
            mine = [(check.row.seconds * 1e6, check.predicted.seconds * 1e6) for check in checks if check.held == held]
            if not mine:
                continue
            x, y = zip(*mine, strict=True)
            low, high = min(low, *x, *y), max(high, *x, *y)
            error = fit.error(check.error for check in checks if check.held == held)
            kind = "held out" if held else "fitted"
            drawn = axes.plot(x, y, "o", color=colours[device], fillstyle="none" if held else "full", markersize=4,
                              alpha=0.8, label=f"{device}, {kind}: {error.mean:.1%}")  # fmt: skip
            drawn[0].set_gid(f"accuracy-{device}-{'held' if held else 'fitted'}")
    axes.plot([low, high], [low, high], color="black", linewidth=0.8)
    axes.legend(frameon=False, fontsize=8)
    return figure
