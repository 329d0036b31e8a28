"""What an export wrote, as its caller reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moekern.onnx.verify import Difference, Layer

_WORST = 8  # layers shown


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how its results differ from exact ones on the example inputs."""

    path: Path
    target: str | None
    why: str  # the target has this mode and form; empty where the caller chose
    mode: str
    moe: str
    activations: str
    opset: int
    ir: int
    nodes: dict[str, int]  # how many of each operator
    bytes: int  # of the file and its external data
    runtimes: dict[str, Difference]  # the results of each from the model's; empty: not verified
    layers: list[Layer]  # calls of moekern's operators in onnxruntime, from their float64 references
    peak_memory: int | None  # bytes that loading and running took in onnxruntime; None: not measured

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=str(self.path), show_header=False)
        table.add_row("target", ": ".join(part for part in (self.target, self.why) if part) or "any")
        table.add_row("mode, experts, activations", f"{self.mode}, {self.moe}, {self.activations}")
        table.add_row("opset, IR", f"{self.opset}, {self.ir}")
        table.add_row("size", _megabytes(self.bytes))
        table.add_row("nodes", f"{sum(self.nodes.values())}: {_counts(self.nodes)}")
        if not self.runtimes:
            table.add_row("verified", "no")
        for runtime, off in self.runtimes.items():
            table.add_row(f"in {runtime}", f"{_error(off)} from the model")
        for layer in sorted(self.layers, key=lambda layer: -layer.difference.rms)[:_WORST]:
            table.add_row(f"  {layer.module}", f"{_error(layer.difference)}, {layer.op}")
        if len(self.layers) > _WORST:
            table.add_row("  ...", f"{len(self.layers) - _WORST} more calls, none further from their references")
        if self.peak_memory is not None:
            table.add_row("peak memory of a run", _megabytes(self.peak_memory))
        console = Console(width=120)
        with console.capture() as text:
            console.print(table)
        return text.get()


def _counts(nodes: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(nodes.items()))


def _error(off: Difference) -> str:
    return f"{off.rms:.1e} rms, {off.max:.1e} at most"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"
