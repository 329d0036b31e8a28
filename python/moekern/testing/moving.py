"""Operands on a device, and results back in CPU memory."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from moekern.backends import loaded
from moekern.experts import ExpertWeights
from moekern.layout import GroupedLayout
from moekern.op import Device
from moekern.scaled import ScaledTensor
from moekern.weights import GroupedWeights

_PASSED = (type(None), bool, int, float, str, torch.dtype)  # as they are


def devices() -> list[tuple[torch.device, Device]]:
    """Every device that was found, as torch names it, the CPU first."""
    return [
        (torch.device(where), device)
        for name, backend in loaded.items()
        for device in backend.devices
        for where in importlib.import_module(f"moekern.backends.{name}").torch_devices(device)[:1]
    ]


class Mover:
    """Copies operands to a device. Those that share memory share it there, at the same strides and offsets.

    `back` takes what an op returned to where the operands came from: as the very object that was moved, if it is one of
    those, with what its memory holds there by now; else in memory of its own.
    """

    def __init__(self, where: torch.device) -> None:
        self._where = where
        self._storages: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # bytes, here and there, by address here
        self._there: dict[int, Any] = {}  # by the id of what was moved
        self._here: dict[int, Any] = {}  # and by the id of what is there

    def __call__(self, x: Any) -> Any:
        if isinstance(x, _PASSED):
            return x
        if id(x) not in self._there:
            moved = self._there[id(x)] = _rebuilt(x, self._tensor, self)
            self._here[id(moved)] = x
        return self._there[id(x)]

    def back(self, x: Any) -> Any:
        if id(x) in self._here:
            return self._here[id(x)]
        return _rebuilt(x, lambda tensor: Mover(torch.device("cpu"))._tensor(tensor), self.back)

    def storages(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The bytes of every storage, here and there."""
        return list(self._storages.values())

    def storage(self, x: torch.Tensor) -> torch.Tensor:
        """The bytes there of the storage that x has here."""
        return self._pair(x)[1]

    def _pair(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        storage = x.untyped_storage()
        if storage._cdata not in self._storages:
            here = torch.empty(0, dtype=torch.uint8, device=x.device).set_(storage)
            self._storages[storage._cdata] = here, here.to(self._where, copy=True)
        return self._storages[storage._cdata]

    def _tensor(self, x: torch.Tensor) -> torch.Tensor:
        there = torch.empty(0, dtype=x.dtype, device=self._where)
        return there.set_(self.storage(x).untyped_storage(), x.storage_offset(), x.shape, x.stride())


def tensors(x: Any) -> list[torch.Tensor]:
    """Every tensor of an operand."""
    found: list[torch.Tensor] = []

    def part(x: Any) -> Any:
        return _rebuilt(x, tensor, part)

    def tensor(x: torch.Tensor) -> torch.Tensor:
        found.append(x)
        return x

    part(x)
    return found


def _rebuilt(x: Any, tensor: Callable[[torch.Tensor], torch.Tensor], part: Callable[[Any], Any]) -> Any:
    """An operand of other tensors: `tensor` of its tensors, `part` of what it consists of."""
    if isinstance(x, _PASSED):
        return x
    if isinstance(x, torch.Tensor):
        return tensor(x.detach())
    if isinstance(x, ScaledTensor):
        return ScaledTensor(part(x.data), part(x.scale), x.block)
    if isinstance(x, GroupedLayout):
        return GroupedLayout(part(x.starts), part(x.counts), x.rows, x.alignment, x.capacity, check=False)
    if isinstance(x, GroupedWeights):
        return GroupedWeights([part(x.group(g)) for g in range(len(x))])
    if isinstance(x, ExpertWeights):
        return ExpertWeights.from_tensors([part(t) for t in x.tensors], x.layout)
    if isinstance(x, dict):
        return {name: part(value) for name, value in x.items()}
    if isinstance(x, (tuple, list)):
        parts = [part(value) for value in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    raise TypeError(f"a {type(x).__name__} is no operand")
