"""What others have published about kernels like these: every row with its source (data/*.csv, data/sources.json)."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from devices import DATA, known, sources

T = TypeVar("T")


@dataclass(frozen=True)
class Gemm:
    """A dense or grouped product. m: rows of each of `groups` groups."""

    source: str
    device: str
    kernel: str
    op: str  # dense, contiguous, masked
    dtype: str
    groups: int
    m: int
    n: int
    k: int
    tile: tuple[int, int, int] | None  # rows, columns, depth, where the source names the kernel
    split: int  # of k
    seconds: float

    @property
    def flops(self) -> int:
        return 2 * self.groups * self.m * self.n * self.k

    @property
    def shape(self) -> tuple[int, int]:
        return self.n, self.k


@dataclass(frozen=True)
class Moe:
    """Both products of a layer's experts, with the activation between them."""

    source: str
    device: str
    kernel: str
    dtype: str
    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    seconds: float


@dataclass(frozen=True)
class Exchange:
    """Dispatch or combine among `ranks` ranks, of `tokens` tokens on each."""

    source: str
    device: str
    library: str
    mode: str  # latency (few tokens, a message for every expert) or throughput (many, one for every rank)
    link: str
    tokens: int
    hidden: int
    top_k: int
    ranks: int
    phase: str
    payload: str  # dtype
    seconds: float | None
    rate: float | None  # bytes a second, as its source counts them


@dataclass(frozen=True)
class Cpu:
    """moekern's own AVX2 kernels on a CPU, as a share of the limit that binds."""

    source: str
    core: str  # architecture, family/model
    m: int
    n: int
    k: int
    read: float  # bytes a second
    multiply_add: float  # operations a second
    share: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.n, self.k


@dataclass(frozen=True)
class Serving:
    """A whole DeepSeek-R1 at work, tokens a second and device."""

    source: str
    device: str
    phase: str  # prefill or decode
    ranks: int
    tokens: int  # on each rank
    context: int
    rate: float


def _serving(row: dict[str, str]) -> Serving:
    sizes = [int(row[key]) for key in ("ranks", "tokens", "context")]
    return Serving(row["source"], row["device"], row["phase"], *sizes, rate=float(row["tokens_per_second"]))


def _cpu(row: dict[str, str]) -> Cpu:
    sizes = [int(row[key]) for key in ("m", "n", "k")]
    rates = float(row["read_gbps"]) * 1e9, float(row["gflops"]) * 1e9
    return Cpu(row["source"], row["core"], *sizes, *rates, float(row["share"]))  # type: ignore[arg-type]


def _gemm(row: dict[str, str]) -> Gemm:
    groups, m, n, k = (int(row[key]) for key in ("groups", "m", "n", "k"))
    seconds = float(row["us"]) * 1e-6 if row["us"] else 2e-12 * groups * m * n * k / float(row["tflops"])
    parts = [int(part) for part in row["tile"].split("x")] if row["tile"] else []
    tile = (parts[0], parts[1], parts[2]) if parts else None
    return Gemm(
        row["source"], row["device"], row["kernel"], row["op"], row["dtype"], groups, m, n, k, tile,
        int(row["split"] or 1), seconds,
    )  # fmt: skip


def _moe(row: dict[str, str]) -> Moe:
    sizes = [int(row[key]) for key in ("tokens", "hidden", "intermediate", "experts", "top_k")]
    return Moe(row["source"], row["device"], row["kernel"], row["dtype"], *sizes, seconds=float(row["us"]) * 1e-6)


def _exchange(row: dict[str, str]) -> Exchange:
    names = [row[key] for key in ("source", "device", "library", "mode", "link")]
    sizes = [int(row[key]) for key in ("tokens", "hidden", "top_k", "ranks")]
    seconds = float(row["us"]) * 1e-6 if row["us"] else None
    rate = float(row["gbps"]) * 1e9 if row["gbps"] else None
    return Exchange(*names, *sizes, row["phase"], row["payload"], seconds, rate)  # type: ignore[arg-type]


def read(path: Path, make: Callable[[dict[str, str]], T]) -> Iterator[T]:
    """Rows of a table. Raises ValueError with the line of one that is none."""
    with path.open(newline="") as file:
        table = csv.DictReader(file)
        for row in table:
            try:
                for key, names in (("device", known()), ("source", sources())):
                    if key in row and row[key] not in names:
                        raise ValueError(f"{key} {row[key]} is not known")
                yield make(row)
            except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
                raise ValueError(f"{path}:{table.line_num}: not a row ({type(error).__name__}: {error})") from None


@cache
def gemms() -> tuple[Gemm, ...]:
    return tuple(read(DATA / "gemm.csv", _gemm))


@cache
def moes() -> tuple[Moe, ...]:
    return tuple(read(DATA / "moe.csv", _moe))


@cache
def exchanges() -> tuple[Exchange, ...]:
    return tuple(read(DATA / "expert_parallel.csv", _exchange))


@cache
def cpus() -> tuple[Cpu, ...]:
    return tuple(read(DATA / "cpu.csv", _cpu))


@cache
def servings() -> tuple[Serving, ...]:
    return tuple(read(DATA / "serving.csv", _serving))


def nearest(device: str, m: int, n: int, k: int, op: str = "dense", groups: int = 1) -> Gemm | None:
    """The last published row of exactly this product on this device with block scales."""
    rows = [
        row
        for row in gemms()
        if (row.device, row.op, row.groups, row.m, row.n, row.k) == (device, op, groups, m, n, k) and row.dtype == "fp8"
    ]
    return max(rows, key=lambda row: sources()[row.source]["date"], default=None)
