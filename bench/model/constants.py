"""The physical constants of a family of devices, as fitted (constants.json, which `run.py fit` writes)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PATH = Path(__file__).parent / "constants.json"


@dataclass(frozen=True)
class Constants:
    """Of a family's matrix kernels. What differs between its devices (cores, rates) is the devices' own."""

    launch: float  # seconds until the first tile computes, and from the last result until the kernel has ended
    rate: float  # share of the dense peak that the matrix units sustain: power, clock, issue
    step: float  # seconds that each 128 of k adds to a tile: wait for operands, drain, promote to f32
    tile: float  # seconds that a tile adds whatever its size: prologue, barrier, address
    store: float  # seconds to scale and write 128 x 128 results
    memory: float  # share of the memory's peak rate that a kernel gets
    operands: float  # bytes a second from L2 into one core
    overlap: float  # p of (a^p + b^p)^(1/p): 1 adds up arithmetic and memory, infinity hides the shorter
    ragged: float = 1.0  # times longer the matrix units take where a tile's columns are no multiple of 32
    queue: float = 1.0  # a further tile on a core over the first one: what tiles that share a core overlap
    split: float = 0.0  # seconds that splitting k adds: clear the result, add into it


@dataclass(frozen=True)
class LinkConstants:
    """Of one kind of link between ranks, and the kernels that use it."""

    start: float  # seconds from a kernel's start to its first byte and back to the last barrier
    doubling: float  # seconds that twice as many ranks add
    share: float  # of the link's rate, where few tokens go by themselves
    bulk: float  # likewise, where many go together among 8 ranks
    bulk_doubling: float = 1.0  # times that with twice as many ranks


@dataclass(frozen=True)
class Fitted:
    """Constants with what they rest on, for whoever reads a prediction."""

    basis: str  # "fitted" or "assumed"
    says: str


@cache
def _table() -> dict[str, dict[str, dict[str, float]]]:
    return json.loads(PATH.read_text())


def of_family(family: str) -> Constants:
    return Constants(**_table()["families"][family])


def of_link(link: str) -> LinkConstants:
    return LinkConstants(**_table()["links"][link])


BASIS = {
    "h800": Fitted("fitted", "on DeepGEMM's rows of the H800"),
    "h100": Fitted("same die", "the H800's constants"),
    "h200": Fitted("same die", "the H800's constants, its own memory"),
    "h20": Fitted("same family", "the H800's constants, its own peak, cores and memory"),
    "mi300x": Fitted("fitted", "on AITER's rows of the MI300X"),
    "mi308x": Fitted("same family", "the MI300X's constants, its own cores; its rows check them"),
    "mi325x": Fitted("same die", "the MI300X's constants, its own memory"),
    "mi355x": Fitted("fitted", "on AITER's rows of the MI355X"),
    "a100": Fitted("borrowed", "Hopper's constants on INT8: no row of the A100 checks them"),
    "b200": Fitted(
        "borrowed", "Hopper's constants: its scales are multiplied by the tensor cores, so it may be faster"
    ),
}
ASCEND = Fitted("assumed", "large products and bandwidth as published for 910B and 910C, the rest as Hopper's")
CPU = Fitted(
    "fitted", "on AVX2 kernels of Zen 3 and Zen 4, whose constants others borrow; limits measured beside each time"
)


def basis(device: str, family: str) -> Fitted:
    return BASIS.get(device) or (CPU if family == "cpu" else ASCEND)
