"""Devices that the benchmark knows: dense peaks, memory and links, each with its source (data/devices.json)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
THIS = "this"  # the device in hand, whose figures are measured


@dataclass(frozen=True)
class Figure:
    """A number and where it is published."""

    value: float
    source: str  # a key of data/sources.json


@dataclass(frozen=True)
class Device:
    """Rates are per second, sizes in bytes. None where no source was found."""

    name: str
    title: str
    arch: str
    family: str  # whose constants the model takes
    peak: Mapping[str, Figure]  # operations, dense: no figure counts zeros that are skipped
    bandwidth: Figure  # of its memory
    memory: Figure
    cache: Figure | None  # the last one before memory
    cores: Figure  # SMs, compute units, cube cores
    clock: Figure | None
    links: Mapping[str, Figure]  # bytes one way, of one device, the fastest first

    @property
    def eight_bit(self) -> str:
        """The 8-bit type that its matrix units multiply: FP8, or INT8 where there is none."""
        return "fp8" if "fp8" in self.peak else "int8"

    def figures(self) -> dict[str, Figure]:
        """Every figure by a name for the reader of a table."""
        named = {f"{dtype}, operations/s": figure for dtype, figure in self.peak.items()}
        named |= {"memory, B/s": self.bandwidth, "memory, B": self.memory, "cores": self.cores}
        named |= {"cache, B": self.cache} if self.cache else {}
        named |= {"clock, Hz": self.clock} if self.clock else {}
        return named | {f"{link}, B/s one way": figure for link, figure in self.links.items()}


def _device(name: str, row: dict[str, Any]) -> Device:
    def figure(pair: list[Any] | None) -> Figure | None:
        return None if pair is None else Figure(float(pair[0]), str(pair[1]))

    fields = dict(row)
    for key in ("bandwidth", "memory", "cache", "cores", "clock"):
        fields[key] = figure(row[key])
    for key in ("peak", "links"):
        fields[key] = {what: Figure(*pair) for what, pair in row[key].items()}
    return Device(name=name, **fields)


@cache
def known() -> dict[str, Device]:
    return {name: _device(name, row) for name, row in json.loads((DATA / "devices.json").read_text()).items()}


@cache
def sources() -> dict[str, dict[str, str]]:
    """What, where, date, and for measurements how."""
    return json.loads((DATA / "sources.json").read_text())


def named(text: str) -> list[str]:
    """Names out of "h800,mi300x,this", spelled as here. Raises ValueError for a device that nobody knows."""
    names = [word.strip().lower().replace("-", "").replace("_", "") for word in text.split(",") if word.strip()]
    if wrong := [name for name in names if name != THIS and name not in known()]:
        raise ValueError(f"{', '.join(wrong)}: no such device; known are {', '.join(known())}, and {THIS}")
    if not names:
        raise ValueError(f"no device named; known are {', '.join(known())}, and {THIS}")
    return list(dict.fromkeys(names))


def by_title(title: str) -> Device | None:
    """The known device that a driver calls so: "NVIDIA H800" is the H800. The longest name that is in it counts."""
    words = title.lower().replace("-", " ").split()
    found = [device for device in known().values() if any(device.name.removeprefix("ascend") == word for word in words)]
    return max(found, key=lambda device: len(device.name), default=None)


def measured(title: str, arch: str, operations: float, bandwidth: float, memory: float, cores: int) -> Device:
    """The CPU in hand, whose peak and bandwidth this run has measured."""

    def here(value: float) -> Figure:
        return Figure(value, "measured in this run")

    peak = {"fp8": here(operations), "bf16": here(operations)}
    return Device(THIS, title, arch, "cpu", peak, here(bandwidth), here(memory), None, here(cores), None, {})


def at_moment(device: Device, operations: float, bandwidth: float) -> Device:
    """The CPU in hand in a moment when these were its limits."""
    return replace(
        device,
        peak={dtype: replace(figure, value=operations) for dtype, figure in device.peak.items()},
        bandwidth=replace(device.bandwidth, value=bandwidth),
    )
