"""Peers of the grouped products: what else a user could call on weights dequantised to bf16 beforehand."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch.nn import functional as F

from moekern import GroupedLayout
from peers import Named


class GroupedPeer(Named):
    """Takes the weights [G, N, K] bf16 before the clock starts; `call(turn)` is one product by the turn's layout."""

    forms: tuple[str, ...] = ("contiguous", "masked")

    def __init__(self, weights: torch.Tensor) -> None:
        self.weights = weights

    def bind(self, x: torch.Tensor, out: torch.Tensor, layouts: list[GroupedLayout]) -> None:
        """Take activations, something like the output, and the layouts that calls take in turn."""
        self.x, self.out, self.layouts = x, torch.zeros_like(out), layouts

    @abstractmethod
    def call(self, turn: int) -> torch.Tensor: ...


class TorchLoop(GroupedPeer):
    name, says = "torch-mm-bf16", "torch.mm for every group that has rows, weights dequantised to bf16 beforehand"

    def bind(self, x: torch.Tensor, out: torch.Tensor, layouts: list[GroupedLayout]) -> None:
        super().bind(x, out, layouts)
        self.rows, self.results = (t.view(-1, t.shape[-1]) for t in (self.x, self.out))
        self.slices = [layout.slices() for layout in layouts]

    def call(self, turn: int) -> torch.Tensor:
        for g, rows in enumerate(self.slices[turn % len(self.slices)]):
            if rows.stop > rows.start:
                torch.mm(self.rows[rows], self.weights[g].t(), out=self.results[rows])
        return self.out


class TorchGroupedMm(GroupedPeer):
    name, says, forms = "torch-grouped-mm", "torch.nn.functional.grouped_mm, likewise", ("contiguous",)

    @staticmethod
    def missing() -> str | None:
        return None if hasattr(F, "grouped_mm") else f"torch {torch.__version__} has no grouped_mm"

    def bind(self, x: torch.Tensor, out: torch.Tensor, layouts: list[GroupedLayout]) -> None:
        super().bind(x, out, layouts)
        self.ends = [layout.counts.cumsum(0).to(torch.int32) for layout in layouts]

    def call(self, turn: int) -> torch.Tensor:
        return F.grouped_mm(self.x, self.weights.mT, offs=self.ends[turn % len(self.ends)])


class TorchBmm(GroupedPeer):
    name, says, forms = "torch-bmm", "torch.bmm over all slots, used or not, likewise", ("masked",)

    def call(self, turn: int) -> torch.Tensor:
        return torch.bmm(self.x, self.weights.mT, out=self.out)


GROUPED_PEERS: tuple[type[GroupedPeer], ...] = (TorchLoop, TorchGroupedMm, TorchBmm)
