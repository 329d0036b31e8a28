"""Where results go: a page, JSON, CSV, a drawing."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
from rich.console import Console


class Nothing(Exception):
    """A run has nothing for a file of this kind; the text says what would have."""


@dataclass(frozen=True)
class Targets:
    html: Path | None
    json: Path | None
    csv: Path | None
    plot: Path | None

    def check(self) -> None:
        """Before minutes of measuring: every folder is there."""
        for option, path in vars(self).items():
            if path is not None and not path.absolute().parent.is_dir():
                raise ValueError(f"--{option} {path}: there is no folder {path.absolute().parent}")

    def write(self, console: Console, result: dict[str, Any]) -> None:
        """Numbers first: no drawing that fails loses them."""
        if self.json:
            report.write_json(self.json, to_json(result))
            console.print(f"results: {self.json}")
        if self.csv:
            _csv(self.csv, result)
            console.print(f"table: {self.csv}")
        if self.plot:
            _plot(self.plot, result)
            console.print(f"drawing: {self.plot}")
        if self.html:
            import pages

            if not any(result.get(key) for key in ("rows", "entries", "model")):
                raise Nothing("--html: the run has no rows to show; products, --compare-devices and --what have")
            pages.write(self.html, result)
            console.print(f"page: {self.html}")


def to_json(result: dict[str, Any]) -> dict[str, Any]:
    """What was found, as numbers and text."""
    plain = {key: value for key, value in result.items() if key not in ("rows", "entries", "model")}
    plain["results"] = [row.to_json() for row in result.get("rows", [])]
    for key in ("entries", "model"):
        if key in result:
            plain[key] = [one.to_json() for one in result[key]]
    return plain


COLUMNS = (
    "kind", "op", "layer", "device", "type", "kernel", "m", "n", "k", "seconds", "operations_per_second", "of_limit",
    "limit", "spread", "noisy", "source",
)  # fmt: skip


def rows_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every number of the tables, a row each, whatever its kind."""
    found = []
    for row in result.get("rows", []):
        found.append(
            {
                "kind": "measured", "op": row.op, "layer": row.linear, "device": "this", "type": row.activations,
                "kernel": row.kernel, **{key: row.shape.get(key) for key in ("m", "n", "k")},
                "seconds": row.samples.median, "operations_per_second": row.flops / row.samples.median or None,
                "of_limit": row.fraction, "limit": row.binds, "spread": row.samples.mad / row.samples.median,
                "noisy": row.samples.noisy, "source": "this run",
            }
        )  # fmt: skip
    for entry in result.get("entries", []):
        row = entry.to_json()
        for kind, seconds in row["seconds"].items():
            if kind != "measured":
                found.append(
                    {
                        "kind": kind, "op": "fp8_gemm_nt", "layer": row["linear"], "device": row["device"],
                        "type": row["dtype"], **{key: row[key] for key in ("m", "n", "k")}, "seconds": seconds,
                        "operations_per_second": row["flops"] / seconds, "of_limit": row["of_peak"][kind],
                        "limit": "dense peak", "source": row["source"] if kind == "published" else row["basis"],
                    }
                )  # fmt: skip
    for run in result.get("model", []):
        if run.found:
            for step in (*run.found.moe, *run.found.attention):
                found.append(
                    {
                        "kind": "predicted", "op": step.name, "layer": run.phase, "device": run.device.name,
                        "type": run.device.eight_bit, "m": run.tokens, "seconds": step.seconds, "limit": step.kind,
                    }
                )  # fmt: skip
    return found


def _csv(path: Path, result: dict[str, Any]) -> None:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(rows_of(result))


def _plot(path: Path, result: dict[str, Any]) -> None:
    from pages import figures

    if result.get("entries"):
        figures.save(figures.throughput(result["entries"]), path)
    elif any(row.flops for row in result.get("rows", [])):
        report.plot(path, result["rows"], result["machine"], result["title"])
    else:
        raise Nothing("--plot: the run has nothing with operations to draw")
