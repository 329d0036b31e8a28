"""Where the weights of groups lie: a stride for a stack, a table of distances for matrices that are tensors of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moekern.scaled import ScaledTensor
from moekern.weights import GroupedWeights

_ALIGNED = 16  # bytes


@dataclass(frozen=True)
class Places:
    """Matrix g of some tensors begins `step` elements times g, or table[g] elements, behind the first's."""

    step: int
    table: torch.Tensor | None  # [G] int64
    aligned: bool  # whether every matrix is as well aligned as the first

    def arguments(self, name: str, device: Any) -> dict[str, Any]:
        return {f"{name}_group": self.step, f"{name}_table": device if self.table is None else self.table}


def of_stack(x: torch.Tensor) -> Places:
    return Places(x.stride(0), None, True)


def of_tensors(tensors: Any) -> Places:
    """Of tensors of one dtype on one device. Copies a table there."""
    first, size = tensors[0].data_ptr(), tensors[0].element_size()
    distances = [x.data_ptr() - first for x in tensors]
    table = torch.tensor([distance // size for distance in distances], dtype=torch.int64)
    return Places(0, table.to(tensors[0].device), all(distance % _ALIGNED == 0 for distance in distances))


def of_weights(weights: ScaledTensor | GroupedWeights) -> tuple[ScaledTensor, Places, Places]:
    """The first matrix, and where the data and the scales of all are. A GroupedWeights keeps its tables."""
    if isinstance(weights, ScaledTensor):
        return weights, of_stack(weights.data), of_stack(weights.scale)
    if weights.places is None:
        weights.places = of_tensors(weights.data), of_tensors(weights.scale)
    return weights.group(0), *weights.places
