"""Devices beside each other, shape by shape: measured here, predicted by the model, published by others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import published
from devices import THIS, Device, at_moment, known
from model import constants
from model.gemm import Prediction, Product
from model.products import predict
from report import bare_table, duration
from rich.table import Table
from rich.text import Text
from suites import Linear
from timing.compete import Row

DEVICES = "h800,h100,mi300x,ascend910c,this"
ROWS = (1, 16, 64, 128, 4096)
MEASURED, PREDICTED, PUBLISHED = "bold green", "yellow", "cyan"  # the ink of each kind, here and on the page


@dataclass(frozen=True)
class Entry:
    """One product on one device."""

    linear: Linear
    m: int
    device: Device
    dtype: str
    predicted: Prediction
    published: published.Gemm | None
    measured: Row | None

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.linear.n * self.linear.k

    @property
    def best(self) -> tuple[str, float]:
        """Seconds by the strongest evidence there is, and which."""
        if self.measured:
            return "measured", self.measured.samples.median
        if self.published:
            return "published", self.published.seconds
        return "predicted", self.predicted.seconds

    def of_peak(self, seconds: float) -> float:
        """Of the dense peak of the type that the device multiplies."""
        return self.flops / seconds / self.device.peak[self.dtype].value

    def to_json(self) -> dict[str, Any]:
        times = {"predicted": self.predicted.seconds}
        times |= {"published": self.published.seconds} if self.published else {}
        times |= {"measured": self.measured.samples.median} if self.measured else {}
        return {
            "linear": self.linear.name,
            "m": self.m,
            "n": self.linear.n,
            "k": self.linear.k,
            "device": self.device.name,
            "title": self.device.title,
            "dtype": self.dtype,
            "basis": constants.basis(self.device.name, self.device.family).basis,
            "flops": self.flops,
            "peak": self.device.peak[self.dtype].value,
            "bandwidth": self.device.bandwidth.value,
            "binds": self.predicted.binds,
            "source": self.published.source if self.published else None,
            "spread": self.measured.samples.mad / self.measured.samples.median if self.measured else None,
            "seconds": times,
            "of_peak": {kind: self.of_peak(seconds) for kind, seconds in times.items()},
        }


def entries(
    names: Iterable[str],
    linears: Iterable[Linear],
    rows: Iterable[int],
    this: Device | None,
    measured: list[Row],
    model: str | None = None,
) -> list[Entry]:
    """Of every linear layer, number of rows and device. `measured` are this run's, on `this`, which is a `model`."""
    chosen = [this if name == THIS else known()[name] for name in names]
    at = {(row.shape["n"], row.shape["k"], row.shape["m"]): row for row in measured if row.selected}
    found = []
    for linear in linears:
        for m in rows:
            for device in chosen:
                assert device is not None
                here = at.get((linear.n, linear.k, m)) if device is this or device.name == model else None
                found.append(
                    Entry(
                        linear=linear,
                        m=m,
                        device=device,
                        dtype=device.eight_bit,
                        predicted=_predicted(device, Product((m,), linear.n, linear.k), here),
                        published=published.nearest(device.name, m, linear.n, linear.k),
                        measured=here,
                    )
                )
    return found


def _predicted(device: Device, product: Product, here: Row | None) -> Prediction:
    """A CPU that neighbours share is predicted from the limits that took turns with what is measured."""
    if here is None or device.family != "cpu":
        return predict(device, product)
    return predict(at_moment(device, here.limits["multiply_add"], here.limits["read"]), product)


def _rate(flops: float, seconds: float) -> str:
    rate = flops / seconds
    return f"{rate / 1e12:.0f} T" if rate >= 1e13 else f"{rate / 1e12:.2g} T" if rate >= 1e12 else f"{rate / 1e9:.0f} G"


def table(found: list[Entry]) -> Table:
    """The entries of one linear layer."""
    shown = bare_table()
    for name in ("M", "device", "type", "measured", "predicted", "published", "op/s", "of peak", "binds", "vs first"):
        left = name in ("device", "type", "binds")
        shown.add_column(name, justify="left" if left else "right", no_wrap=True)
    previous, first = None, 1.0
    for entry in found:
        _, best = entry.best
        if entry.m != previous:
            first = best
        off = ""
        if entry.published:
            off = f" ({entry.predicted.seconds / entry.published.seconds - 1:+.0%})"
        elif entry.measured:
            off = f" ({entry.predicted.seconds / entry.measured.samples.median - 1:+.0%})"
        ink = {"measured": MEASURED, "predicted": PREDICTED, "published": PUBLISHED}[entry.best[0]]
        shown.add_row(
            str(entry.m) if entry.m != previous else "",
            entry.device.name,
            entry.dtype,
            Text(duration(entry.measured.samples.median), MEASURED) if entry.measured else "",
            Text(duration(entry.predicted.seconds) + off, PREDICTED),
            Text(duration(entry.published.seconds), PUBLISHED) if entry.published else "",
            Text(_rate(entry.flops, best), ink),
            Text(f"{entry.of_peak(best):.0%}", ink),
            entry.predicted.binds,
            f"{first / best:.2g}x" if first / best < 10 else f"{first / best:.0f}x",
        )
        previous = entry.m
    return shown


def legend(found: list[Entry], say: Callable[[str], None]) -> None:
    """What the columns mean, which types are compared, and what each prediction rests on."""
    say(
        f"[{MEASURED}]measured[/] in this run, [{PREDICTED}]predicted[/] by bench/model (in brackets its error against "
        f"what is beside it), [{PUBLISHED}]published[/] by others. op/s and of peak: of the strongest that is there."
    )
    types = {entry.device.name: entry.dtype for entry in found}
    if len(set(types.values())) > 1:
        others = ", ".join(name for name, dtype in types.items() if dtype != "fp8")
        say(f"{others}: no FP8, so INT8 products of the same shape; of peak is of INT8 there, of FP8 elsewhere.")
    for device in {entry.device.name: entry.device for entry in found}.values():
        basis = constants.basis(device.name, device.family)
        peak = device.peak[device.eight_bit].value / 1e12
        memory = device.bandwidth.value / 1e12
        say(f"{device.name}: {device.title}, {peak:.4g} T {device.eight_bit} dense, {memory:.3g} TB/s; "
            f"constants {basis.basis}, {basis.says}")  # fmt: skip
