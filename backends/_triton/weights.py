"""Where the weights of groups lie: at a stride in a stack, in a table of distances if they are tensors of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moekern.experts import ExpertWeights
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


@dataclass(frozen=True)
class Biases:
    """Vectors gate[e] and up[e] elements behind `first`."""

    first: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor


@dataclass(frozen=True)
class Projections:
    """An ExpertWeights as kernels read it: first matrices, and tables [E] int64 of distances from them in elements."""

    gate_up: ScaledTensor  # the first gate: up's matrices have its strides
    gate: torch.Tensor
    up: torch.Tensor
    gate_scale: torch.Tensor
    up_scale: torch.Tensor
    up_first: int  # the row at which up begins in its matrix
    gate_up_bias: Biases | None
    aligned: bool
    down: ScaledTensor
    down_places: tuple[Places, Places]
    down_bias: tuple[torch.Tensor, Places] | None


def projections(experts: ExpertWeights) -> Projections:
    if experts.places is None:
        experts.places = _projections(experts)
    return experts.places


def _projections(experts: ExpertWeights) -> Projections:
    matrices = list(zip(*experts.projections(), strict=True))
    gate, up, down = ([matrix for matrix, _ in of] for of in matrices)
    gate_bias, up_bias, down_bias = ([bias for _, bias in of] for of in matrices)
    data = of_tensors([x.data for x in (*gate, *up)])
    scale = of_tensors([x.scale for x in (*gate, *up)])
    count = len(gate)
    assert data.table is not None and scale.table is not None
    biases = None
    if gate_bias[0] is not None:
        bias = of_tensors([*gate_bias, *up_bias])
        assert bias.table is not None
        biases = Biases(gate_bias[0], bias.table[:count], bias.table[count:])
    return Projections(
        gate[0],
        data.table[:count],
        data.table[count:],
        scale.table[:count],
        scale.table[count:],
        experts.up_first,
        biases,
        data.aligned,
        down[0],
        (of_tensors([x.data for x in down]), of_tensors([x.scale for x in down])),
        None if down_bias[0] is None else (down_bias[0], of_tensors(down_bias)),
    )
