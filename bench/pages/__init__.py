"""A page of results that stands alone: text, tables and drawings in one HTML file (`run.py --html`)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import devices
import predictions
import published
import report
from comparison import Entry
from model import constants
from rich.text import Text
from timing.compete import Row
from timing.machine import headline
from whole_model import Run

from pages import figures

TEMPLATE = Path(__file__).parent / "page.html.j2"


def write(path: Path, result: dict[str, Any]) -> None:
    path.write_text(render(result, result.get("rows", []), result.get("entries", []), result.get("model", [])))


def render(result: dict[str, Any], rows: list[Row], entries: list[Entry], runs: list[Run]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    shown = {entry.device.name: entry.device for entry in entries} | {run.device.name: run.device for run in runs}
    return environment.get_template(TEMPLATE.name).render(
        machine=result["machine"],
        headline=headline(result["machine"]),
        plots=_plots(rows, entries, runs),
        ratios=_ratios(entries),
        measured=[_measured(row) for row in rows],
        layers=_layers(entries),
        runs=runs,
        servings=published.servings(),
        accuracy=predictions.groups(),
        devices=list(shown.values()),
        basis={name: constants.basis(name, device.family) for name, device in shown.items()},
        sources=_cited(shown.values(), entries),
        notes=result.get("notes", []),
        noisy=sum(row.samples.noisy for row in rows),
        duration=report.duration,
        ink=figures.INK,
    )


def _plots(rows: list[Row], entries: list[Entry], runs: list[Run]) -> list[tuple[str, str, str]]:
    """A name, an SVG and what it shows, of each."""
    found = []
    if entries:
        found.append(("roofline", figures.svg(figures.roofline(entries)), "Roofline. Each device's lines are its dense "
                      "peak and its memory; each point is a product."))  # fmt: skip
        found.append(("throughput", figures.svg(figures.throughput(entries)), "Throughput by the number of rows M."))
        found.append(("share", figures.svg(figures.share(entries)), "The same as a share of the dense peak of the type "
                      "that each device multiplies."))  # fmt: skip
    if runs:
        found.append(("steps", figures.svg(figures.steps(runs)), "Where the time of a layer goes, predicted."))
    if any(row.flops for row in rows):
        found.append(("limits", figures.svg(figures.limits(rows)), "This machine: every product as a share of what its "
                      "own memory and vector units allow, measured in the same run."))  # fmt: skip
    found.append(("accuracy", figures.svg(figures.accuracy()), "Predicted against published time. Filled: rows that "
                  "constants were fitted on. Open: rows that they were not."))  # fmt: skip
    return found


def _ratios(entries: list[Entry]) -> list[dict[str, Any]]:
    """For each layer and M the time on the first device over that on each, with the ink of the weaker evidence."""
    tables: list[dict[str, Any]] = []
    cells: dict[tuple[str, int], list[Entry]] = {}
    for entry in entries:
        cells.setdefault((entry.linear.name, entry.m), []).append(entry)
    order = ("measured", "published", "predicted")
    for (layer, m), found in cells.items():
        kind, first = found[0].best
        ratios = []
        for entry in found:
            own, seconds = entry.best
            ratios.append((first / seconds, max(kind, own, key=order.index), entry.of_peak(seconds)))
        tables.append({"layer": layer, "m": m, "devices": [e.device.name for e in found], "ratios": ratios})
    return tables


def _layers(entries: list[Entry]) -> list[dict[str, Any]]:
    """Every entry with its times, for the long table."""
    return [{"entry": entry, "best": entry.best, "of_peak": entry.of_peak(entry.best[1])} for entry in entries]


def _measured(row: Row) -> dict[str, Any]:
    spread = report.spread(row.samples)
    text = spread.plain if isinstance(spread, Text) else str(spread)
    peers = {name: row.ratio(name) for name in row.peers}
    return {"row": row, "spread": text, "peers": peers}


def _cited(shown: Iterable[devices.Device], entries: list[Entry]) -> list[tuple[str, dict[str, str]]]:
    """The sources that the page rests on, by their keys."""
    names = {figure.source for device in shown for figure in device.figures().values()}
    names |= {entry.published.source for entry in entries if entry.published}
    names |= {row.source for row in published.servings()}
    return [(name, source) for name, source in devices.sources().items() if name in names]
