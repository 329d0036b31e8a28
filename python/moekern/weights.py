"""GroupedWeights: weight matrices that are not one tensor, as the right operand of a grouped product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moekern import _C
from moekern.scaled import ScaledTensor, as_scaled, parts


class GroupedWeights:
    """FP8 weights of G groups, each [N, K] with its scales, wherever they lie: used in place, without a copy.

        experts = moekern.GroupedWeights([ScaledTensor(e.weight, e.weight_scale_inv) for e in experts])

    groups: ScaledTensors or (data, scale) pairs of one shape, format, block and strides. A stack
        [G, N, K] needs none of this: it is a ScaledTensor.

    Their addresses are read once, here, so that a call does not read hundreds of tensors: make it once
    and keep it. It keeps the memory that the tensors have now, even if they are given other memory later.

    Raises ValueError or TypeError naming the group.
    """

    __slots__ = ("block", "data", "places", "scale", "table")

    data: tuple[torch.Tensor, ...]
    scale: tuple[torch.Tensor, ...]
    block: tuple[int, int]
    places: Any  # the same on a device, made there by the first kernel that wants it
    table: object | None  # addresses for native kernels; None of fake and other subclasses, and under a compiler

    def __init__(self, groups: Sequence[ScaledTensor | tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._fill(groups, "GroupedWeights", "groups")
        # Aliases: an owner that gives its tensor other memory (`.data = `, Module.to) leaves these alone.
        self.data, self.scale = tuple(x.detach() for x in self.data), tuple(x.detach() for x in self.scale)

    def _fill(self, groups: Any, op: str, name: str) -> None:
        if not isinstance(groups, (list, tuple)):
            raise TypeError(f"{op}: {name} is a {type(groups).__name__}; it must be a sequence of FP8 matrices")
        if not groups:
            raise ValueError(f"{op}: {name} is empty; without a matrix its shape is not known")
        found = [as_scaled(x, f"{op}: {name}[{g}]") for g, x in enumerate(groups)]
        for g, x in enumerate(found):
            if x.data.dim() != 2:
                raise ValueError(f"{op}: {name}[{g}] has {x.data.dim()} dimensions; it must have 2")
            if x.block != found[0].block:
                raise ValueError(f"{op}: {name}[{g}] has block {x.block}; all must be alike, {found[0].block}")
        self._keep([x.data for x in found], [x.scale for x in found], found[0].block, op, name)

    def _keep(
        self, data: list[torch.Tensor], scale: list[torch.Tensor], block: tuple[int, int], op: str, name: str
    ) -> None:
        self.data, self.scale, self.block, self.places = tuple(data), tuple(scale), block, None
        plain = type(data[0]) in (torch.Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
        self.table = _C.weight_table(op, name, data, scale, *block) if plain else None

    def __len__(self) -> int:
        """The number of groups."""
        return len(self.data)

    def __repr__(self) -> str:
        return f"GroupedWeights({len(self)} of {list(self.data[0].shape)} {self.data[0].dtype}, block={self.block})"

    @property
    def shape(self) -> torch.Size:
        """[G, N, K], as of a stack."""
        return torch.Size((len(self.data), *self.data[0].shape))

    def group(self, g: int) -> ScaledTensor:
        """The matrix of group g."""
        return ScaledTensor(self.data[g], self.scale[g], self.block)


def _is_list(x: Any) -> bool:
    """Whether x is a list of matrices: not the pair (data, scale) of a stack."""
    if not isinstance(x, (list, tuple)):
        return False
    return len(x) != 2 or isinstance(x[0], (ScaledTensor, list, tuple))


def as_weights(x: Any, op: str, name: str) -> ScaledTensor | GroupedWeights:
    """A stack, or GroupedWeights for a list of matrices. Errors begin with `op: name`."""
    if isinstance(x, (ScaledTensor, GroupedWeights)):
        return x
    if _is_list(x):
        weights = GroupedWeights.__new__(GroupedWeights)
        weights._fill(x, op, name)
        return weights
    return as_scaled(x, f"{op}: {name}")


def to_lists(x: Any) -> tuple[list[torch.Tensor], list[torch.Tensor], list[int]]:
    """(data, scale, block) for torch.library: a list of one stack, or of a matrix for every group."""
    if isinstance(x, GroupedWeights):
        return list(x.data), list(x.scale), list(x.block)
    matrices = [parts(matrix) for matrix in x] if _is_list(x) else [parts(x)]
    return [m[0] for m in matrices], [m[1] for m in matrices], list(matrices[0][2])


def from_lists(data: list[torch.Tensor], scale: list[torch.Tensor], block: list[int], op: str) -> Any:
    """What to_lists was given, as as_weights returns it."""
    if len(data) == 1 and data[0].dim() == 3:
        return ScaledTensor(data[0], scale[0], (block[0], block[1]))
    weights = GroupedWeights.__new__(GroupedWeights)
    weights._keep(data, scale, (block[0], block[1]), op, "b")
    return weights
