"""Tiles that were measured on a device, kept on disk: taken where there are any, in place of the cheapest by cost.

A file is of one device's name, of these sources and of one release of Triton: after a change of any nobody finds it.
Nothing here imports Triton.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moekern.backends._triton.targets import Target
from moekern.backends._triton.tiles import Shape, Tiles, next_power_of_2, shared_bytes

_SCHEMA = 1  # of the file

Choose = Callable[[Target, Shape], Tiles]


@dataclass(frozen=True)
class Entry:
    """few: of the kernels for few rows. shape: its rows a power of two. Times in microseconds, of the whole call."""

    few: bool
    shape: Shape
    tiles: Tiles
    time: float
    time_by_cost: float  # with the tiles that the cost chooses

    @property
    def key(self) -> tuple[bool, Shape]:
        return self.few, self.shape


def class_of(shape: Shape) -> Shape:
    """The shape that others are tuned as: the next power of two rows."""
    return replace(shape, rows=next_power_of_2(shape.rows))


def preferred(choose: Choose, few: bool) -> Choose:
    """`choose`, unless the device has something measured."""

    def chosen(target: Target, shape: Shape) -> Tiles:
        by_cost = choose(target, shape)
        if not target.product:
            return by_cost
        entry = load(target).get((few, class_of(shape)))
        return by_cost if entry is None or not replaceable(target, shape, by_cost, entry.tiles) else entry.tiles

    return chosen


def replaceable(target: Target, shape: Shape, by_cost: Tiles, tiles: Tiles) -> bool:
    """Whether a row has the same bits, or in a split product sums as exact, and the tiles fit."""
    same = ("depth", "swap", "descriptors", "specialised")
    if any(getattr(tiles, name) != getattr(by_cost, name) for name in same):
        return False
    if (tiles.splits > 1) != (by_cost.splits > 1) or (shape.paired and tiles.columns != by_cost.columns):
        return False
    return shared_bytes(tiles, shape) <= target.shared_memory


def folder() -> Path:
    """MOEKERN_CACHE_DIR, or moekern in the user's cache."""
    if own := os.environ.get("MOEKERN_CACHE_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moekern"


def path(target: Target) -> Path:
    device = re.sub(r"\W+", "-", f"{target.product} {target.name} {target.processors}").strip("-")
    return folder() / "tiles" / f"{device}.{checksum()}.json"


@functools.cache
def checksum() -> str:
    """Of what a measured time depends on, but for the device and its driver."""
    from moekern.backends._triton.kernels import version

    found = hashlib.sha256(f"{_SCHEMA} {version()}".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        found.update(source.read_bytes())
    return found.hexdigest()[:16]


@functools.lru_cache(64)
def load(target: Target) -> Mapping[tuple[bool, Shape], Entry]:
    """What was measured on such a device; nothing, and a warning, where the file cannot be read."""
    try:
        found = json.loads(path(target).read_text())
        entries = [_entry(row) for row in found["entries"]]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"tuned tiles in {path(target)} are not used: {type(error).__name__}: {error}", stacklevel=2)
        return {}
    return {entry.key: entry for entry in entries}


def save(target: Target, entries: list[Entry]) -> Path:
    """Beside what is there of other shapes. Whoever reads meanwhile finds the old file or the new one."""
    kept = {**load(target), **{entry.key: entry for entry in entries}}
    where = path(target)
    where.parent.mkdir(parents=True, exist_ok=True)
    new = where.with_suffix(f".{os.getpid()}")
    new.write_text(
        json.dumps({"device": target.product, "entries": [asdict(entry) for entry in kept.values()]}, indent=1)
    )
    new.replace(where)
    load.cache_clear()
    return where


def _entry(row: dict[str, Any]) -> Entry:
    """Raises TypeError for fields that are missing, unknown, or not of their types."""
    shape, tiles = Shape(**row["shape"]), Tiles(**row["tiles"])
    for value in (shape, tiles):
        for name, found in asdict(value).items():
            if type(found) is not type(getattr(_LIKE[type(value)], name)):
                raise TypeError(f"{name} is {found!r}")
    return Entry(bool(row["few"]), shape, tiles, float(row["time"]), float(row["time_by_cost"]))


_LIKE = {Shape: Shape(1, 1, 1), Tiles: Tiles(1, 1, 1, 1)}
