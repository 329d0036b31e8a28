"""Dispatch and combine of expert parallelism: bytes over links, and what a message waits for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from devices import Device

from model import constants
from model.constants import LinkConstants
from model.passes import scales

NODE = 8  # devices that the fast link of a server joins; HCCS joins all ranks of a supernode
FEW = 512  # tokens a rank: up to here every token goes to every expert by itself, beyond once to a rank
JOINS_ALL = ("hccs",)
KEPT_NODES = 4  # nodes that a token's experts are on at most, where routing is limited to groups


@dataclass(frozen=True)
class Prediction:
    seconds: float
    start: float  # what does not depend on bytes
    bytes: dict[str, float]  # over each link, of one rank
    rate: float  # bytes a second, as publications count them


def payload(phase: str, hidden: int, dtype: str) -> float:
    """Bytes of a token. Dispatch sends 8 bits and scales, of a 1x128 block or for INT8 of a token; combine bf16."""
    if phase == "combine" or dtype == "bf16":
        return 2.0 * hidden
    return hidden + (4.0 if dtype == "int8" else scales(hidden))


def distinct(places: float, draws: int) -> float:
    """How many of so many places are expected to be hit by independent draws."""
    return places * (1 - (1 - 1 / places) ** draws)


@dataclass(frozen=True)
class Messages:
    """Of one token, and how many of them publications count: those to its own rank or node too."""

    inside: float  # to other ranks of its node
    outside: float  # to other nodes
    counted: float


def messages(ranks: int, node: int, top_k: int, few: bool) -> Messages:
    nodes = max(1, ranks // node)
    inside = min(ranks, node)
    if few:
        return Messages(top_k * (inside - 1) / ranks, top_k * (ranks - inside) / ranks, top_k)
    # One copy goes to each node and spreads there: a rank is met once.
    reached = min(KEPT_NODES, distinct(nodes, top_k))
    within = distinct(inside, max(1, round(top_k / reached)))
    counted = within if nodes == 1 else reached
    return Messages(reached * within * (inside - 1) / inside, reached * (nodes - 1) / nodes, counted)


def predict(
    device: Device, phase: str, tokens: int, ranks: int, hidden: int, top_k: int, dtype: str | None = None,
    few: bool | None = None, constant: dict[str, LinkConstants] | None = None, node: int | None = None,
) -> Prediction:  # fmt: skip
    """One dispatch or combine of `tokens` tokens on each of the ranks, spread evenly. node: ranks of a server."""
    if not device.links:
        raise ValueError(f"{device.title}: no figure of its links was found, so --ep is 1")
    fast, *others = device.links
    node = node or (ranks if fast in JOINS_ALL else NODE)
    if ranks > node and not others:
        raise ValueError(f"{device.title}: no figure of a link between servers, so --ep is at most {node}")
    few = tokens <= FEW if few is None else few
    sent = messages(ranks, node, top_k, few)
    size = payload(phase, hidden, dtype or device.eight_bit)
    bytes = {fast: sent.inside * tokens * size}
    if ranks > node:
        bytes[others[0]] = sent.outside * tokens * size
    of = {link: (constant or {}).get(link) or constants.of_link(link) for link in bytes}
    doublings = math.log2(ranks)
    start = max(one.start + one.doubling * doublings for one in of.values())

    def seconds_of(link: str) -> float:
        one = of[link]
        share = one.share if few else one.bulk * one.bulk_doubling ** (doublings - 3)
        return bytes[link] / (device.links[link].value * share)

    seconds = start + max(map(seconds_of, bytes))
    return Prediction(seconds, start, bytes, sent.counted * tokens * size / seconds)
