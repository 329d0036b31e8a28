"""The constants from published rows, and how well they predict rows that they were not fitted on.

Whole shapes (n, k) are held out, with all their numbers of rows and groups: a row's neighbours would say too much about
it. `python bench/run.py fit` writes constants.json; `run.py accuracy` reports.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace

import published
from devices import known, measured, sources

from model import cpu, exchange
from model.constants import Constants, LinkConstants
from model.gemm import Prediction, Product, predict
from model.tiles import Tile

# Two of DeepGEMM's six shapes, four of twelve each of AITER's.
HELD: dict[str, set[tuple[int, int]]] = {
    "h800": {(24576, 1536), (7168, 2048)},
    "mi300x": {(256, 7168), (1536, 7168), (4096, 512), (7168, 2048)},
    "mi355x": {(2112, 7168), (7168, 2304), (24576, 1536), (4096, 512)},
}
# Where the search starts, and whereto constants that no row says anything about are drawn.
PRIOR = {
    "h800": Constants(launch=2e-6, rate=0.9, step=80e-9, tile=1e-6, store=1e-6, memory=0.85, operands=110e9,
                      overlap=2.5, ragged=1.2),
    "mi300x": Constants(launch=2e-6, rate=0.5, step=150e-9, tile=0.5e-6, store=1e-6, memory=0.7, operands=50e9,
                        overlap=2.5, queue=0.8, split=4e-6),
    "mi355x": Constants(launch=2e-6, rate=0.4, step=200e-9, tile=0.5e-6, store=1e-6, memory=0.7, operands=80e9,
                        overlap=2.5, queue=0.8, split=4e-6),
}  # fmt: skip
# Of Ascend no row by shape is published, but 77 to 83% of INT8 peak and 84% of bandwidth on the 910C, and 83% of bf16
# peak for 8192 x 8192 x 8192 on a 910B: large products come out there, and operands do not bind them.
ASSUMED = {"rate": 0.93, "memory": 0.84, "operands": 400e9}
PULL = 0.3  # weight of the prior: a factor of e away costs as much as a row that is off by 30%
AT_MOST = {"rate": 1.0, "memory": 1.0, "queue": 1.0}


@dataclass(frozen=True)
class Check:
    """A published row beside its prediction."""

    row: published.Gemm
    predicted: Prediction
    held: bool

    @property
    def error(self) -> float:
        return self.predicted.seconds / self.row.seconds - 1


def product_of(row: published.Gemm) -> Product:
    return Product((row.m,) * row.groups, row.n, row.k, contiguous=row.op == "contiguous")


def of_row(row: published.Gemm, constant: Constants | None = None, its_tile: bool = False) -> Prediction:
    """As a user would get it, without a look at the tile that the row's kernel has; or on that tile."""
    tile = Tile(*row.tile, row.split) if its_tile and row.tile else None
    return predict(known()[row.device], product_of(row), row.dtype, row.kernel, tile, constant)


def rows_of(device: str) -> list[published.Gemm]:
    return [row for row in published.gemms() if row.device == device and row.dtype == "fp8"]


def fit(rows: Sequence[published.Gemm], prior: Constants) -> Constants:
    """The constants whose logarithms' squares of relative errors are least; rows that are far off count less."""
    import numpy
    from scipy.optimize import least_squares

    # What the prior leaves at its default, which does nothing, is of the other families.
    names = [f.name for f in fields(Constants) if getattr(prior, f.name) != f.default]
    start = numpy.log([getattr(prior, name) for name in names])
    most = numpy.log([AT_MOST.get(name, math.inf) for name in names])

    def errors(point: numpy.ndarray) -> list[float]:
        constant = _at(prior, names, point)
        of_rows = [math.log(of_row(row, constant, its_tile=True).seconds / row.seconds) for row in rows]
        return [*of_rows, *(PULL * (point - start))]

    found = least_squares(errors, start, bounds=(-numpy.inf, most), loss="soft_l1", f_scale=0.1)
    return replace(prior, **{name: float(f"{x:.4g}") for name, x in asdict(_at(prior, names, found.x)).items()})


def _at(prior: Constants, names: Sequence[str], point: Iterable[float]) -> Constants:
    return replace(prior, **{name: math.exp(x) for name, x in zip(names, point, strict=True)})


def fitted_rows(device: str) -> list[published.Gemm]:
    return [row for row in rows_of(device) if row.shape not in HELD[device]]


def checks(device: str, constant: Constants | None = None, held: set[tuple[int, int]] | None = None) -> list[Check]:
    """All rows of a device. Where nothing was fitted, all are held out."""
    out = HELD.get(device) if held is None else held
    return [Check(row, of_row(row, constant), out is None or row.shape in out) for row in rows_of(device)]


def leave_one_shape_out(device: str) -> list[Check]:
    """Every row predicted with constants that were fitted on the other shapes."""
    found = []
    for shape in sorted({row.shape for row in rows_of(device)}):
        constant = fit([row for row in rows_of(device) if row.shape != shape], PRIOR[device])
        found += [check for check in checks(device, constant, {shape}) if check.held]
    return found


# ---- links -------------------------------------------------------------------------------------------

# DeepEP's kernels that use NVLink within a server, and the two libraries of the 910C.
LATENCY = {"h800": ("deepep-2025-06", "deepep-2025-02"), "ascend910c": ("sgl-kernel-npu", "cloudmatrix384")}
BULK = {"h800": ("deepep-2025-02", "deepep-2025-04"), "ascend910c": ("sgl-kernel-npu",)}
LINK_PRIOR = {
    "h800": {"nvlink": LinkConstants(30e-6, 1e-6, 0.8, 0.8), "rdma": LinkConstants(30e-6, 1e-6, 0.9, 0.9)},
    "ascend910c": {"hccs": LinkConstants(60e-6, 8e-6, 0.7, 0.35, 0.85)},
}
# Held out: of NVLink and RDMA all combines, of HCCS 16 ranks and everything of the other library.


@dataclass(frozen=True)
class LinkCheck:
    row: published.Exchange
    predicted: exchange.Prediction
    held: bool

    @property
    def error(self) -> float:
        """Of the time, or where only a rate is published of one over it."""
        if self.row.seconds is not None:
            return self.predicted.seconds / self.row.seconds - 1
        assert self.row.rate is not None
        return self.row.rate / self.predicted.rate - 1


def _link_rows(device: str) -> list[published.Exchange]:
    """The last published row of every exchange."""
    last: dict[tuple[object, ...], published.Exchange] = {}
    for row in published.exchanges():
        taken = LATENCY[device] if row.mode == "latency" else BULK[device]
        if row.device == device and row.source in taken:
            key = row.library, row.mode, row.ranks, row.phase
            before = last.get(key)
            if before is None or _date(before) < _date(row):
                last[key] = row
    return list(last.values())


def _date(row: published.Exchange) -> str:
    return sources()[row.source]["date"]


def _exchange(row: published.Exchange, constant: dict[str, LinkConstants] | None) -> exchange.Prediction:
    few = row.mode == "latency"
    return exchange.predict(
        known()[row.device], row.phase, row.tokens, row.ranks, row.hidden, row.top_k, row.payload, few, constant
    )


def _held(row: published.Exchange) -> bool:
    return row.phase == "combine" if row.device == "h800" else row.ranks == 16 or row.library == "CANN EP"


def link_checks(device: str, constant: dict[str, LinkConstants] | None = None) -> list[LinkCheck]:
    return [LinkCheck(row, _exchange(row, constant), _held(row)) for row in _link_rows(device)]


def fit_links(device: str) -> dict[str, LinkConstants]:
    import numpy
    from scipy.optimize import least_squares

    prior = LINK_PRIOR[device]
    places = [(link, f.name) for link, one in prior.items() for f in fields(one) if getattr(one, f.name) != f.default]
    start = numpy.log([getattr(prior[link], name) for link, name in places])
    most = numpy.log([math.inf if name in ("start", "doubling") else 1.0 for _, name in places])

    def at(point: Iterable[float]) -> dict[str, LinkConstants]:
        found = dict(prior)
        for (link, name), x in zip(places, point, strict=True):
            found[link] = replace(found[link], **{name: math.exp(x)})
        return found

    def errors(point: numpy.ndarray) -> list[float]:
        of_rows = [math.log1p(check.error) for check in link_checks(device, at(point)) if not check.held]
        return [*of_rows, *(PULL * (point - start))]

    found = least_squares(errors, start, bounds=(-numpy.inf, most), loss="soft_l1", f_scale=0.1)
    return {
        link: LinkConstants(**{name: float(f"{x:.4g}") for name, x in asdict(one).items()})
        for link, one in at(found.x).items()
    }


# ---- this project's CPU kernels ----------------------------------------------------------------------

CPU_HELD = {(2112, 7168), (7168, 16384)}
CPU_PRIOR = cpu.CpuConstants(0.85, 2.0, 0.95, 8.0, 0.95, 2.5)


@dataclass(frozen=True)
class CpuCheck:
    row: published.Cpu
    seconds: float
    predicted: Prediction
    held: bool

    @property
    def error(self) -> float:
        return self.predicted.seconds / self.seconds - 1


def cpu_checks(core: str, constant: cpu.CpuConstants | None = None) -> list[CpuCheck]:
    found = []
    for row in published.cpus():
        if row.core != core:
            continue
        device = measured("", row.core, row.multiply_add, row.read, 0.0, 0)
        product = Product((row.m,), row.n, row.k)
        seconds = max(product.flops / row.multiply_add, product.bytes / row.read) / row.share
        predicted = cpu.predict(device, product, constant)
        found.append(CpuCheck(row, seconds, predicted, row.shape in CPU_HELD))
    return found


def fit_cpu(core: str) -> cpu.CpuConstants:
    import numpy
    from scipy.optimize import least_squares

    names = [f.name for f in fields(CPU_PRIOR)]
    start = numpy.log([getattr(CPU_PRIOR, name) for name in names])

    def at(point: Iterable[float]) -> cpu.CpuConstants:
        return cpu.CpuConstants(**{name: math.exp(x) for name, x in zip(names, point, strict=True)})

    def errors(point: numpy.ndarray) -> list[float]:
        of_rows = [math.log1p(check.error) for check in cpu_checks(core, at(point)) if not check.held]
        return [*of_rows, *(PULL * (point - start))]

    found = least_squares(errors, start, loss="soft_l1", f_scale=0.1)
    return cpu.CpuConstants(**{name: float(f"{x:.4g}") for name, x in asdict(at(found.x)).items()})


# ---- all ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Error:
    rows: int
    mean: float
    worst: float  # with its sign

    def __str__(self) -> str:
        return f"{self.rows} rows, mean {self.mean:.1%}, worst {self.worst:+.0%}"


def error(errors: Iterable[float]) -> Error:
    found = list(errors)
    return Error(len(found), statistics.fmean(map(abs, found)), max(found, key=abs))


def refit() -> dict[str, dict[str, dict[str, float]]]:
    """What constants.json holds: every family and link, on the rows that are not held out."""
    families = {known()[device].family: fit(fitted_rows(device), prior) for device, prior in PRIOR.items()}
    families["ascend"] = replace(families["hopper"], **ASSUMED)
    cpus = {core: fit_cpu(core) for core in cpu.CORES}
    of_cpu = cpus[cpu.OTHERS]
    # What passes and attention take of it; products have a model of their own.
    families["cpu"] = Constants(cpu.CALL, of_cpu.packed_rate, 0.0, 0.0, 0.0, of_cpu.memory, 1e15, of_cpu.overlap)
    links = {link: one for device in LINK_PRIOR for link, one in fit_links(device).items()}
    links["infinity fabric"] = links["nvlink"]  # no row of it
    return {
        "families": {name: asdict(one) for name, one in families.items()},
        "links": {name: asdict(one) for name, one in links.items()},
        "cpus": {core: asdict(one) for core, one in cpus.items()},
    }
