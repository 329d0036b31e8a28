"""What else one could call, for linear layers, grouped products and experts; and who of them is here."""

from __future__ import annotations

import importlib.util
from abc import ABC
from typing import Any, TypeVar


class Named(ABC):
    """What every peer says of itself."""

    name: str  # family-variant
    says: str  # what it computes, for the reader of a table

    @staticmethod
    def missing() -> str | None:
        """Why this peer cannot run here, or None."""
        return None


def without(*packages: str) -> str | None:
    """The first of the packages that is not installed, said as a reason."""
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"{absent[0]} is not installed" if absent else None


P = TypeVar("P", bound="type[Any]")


def choose(wanted: str, peers: tuple[P, ...]) -> tuple[list[P], dict[str, str]]:
    """Peers by name or family ("torch", "onnxruntime-int8", "none"), and why those absent are absent."""
    chosen: list[P] = []
    absent: dict[str, str] = {}
    for word in (part.strip() for part in wanted.split(",") if wanted != "none"):
        named = [peer for peer in peers if word in (peer.name, peer.name.split("-")[0])]
        if not named:
            names = ", ".join(peer.name for peer in peers)
            raise ValueError(f"--peers {word}: it is none of {names}, or a family of them")
        for peer in named:
            if reason := peer.missing():
                absent[peer.name] = reason
            elif peer not in chosen:
                chosen.append(peer)
    return chosen, absent
