"""The kernels of the accelerators that are here, for tests whose operands and results are in CPU memory.

Operands are copied with all the memory they lie in, so that a kernel has them as the test laid them out, and finds what
the test put around them; outputs come back the same way. `pytest -m gpu` is the tests of these kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from executors import Executor

import moekern
from moekern import Device, Kernel
from moekern.backends import loaded
from moekern.op import Op
from moekern.testing import moving
from moekern.testing.moving import Mover, tensors

WRITTEN = ("out", "workspace")  # parameters of ops


def devices() -> list[tuple[torch.device, Device]]:
    """One of every kind and architecture but the CPU: the last, which of several is not torch's current one."""
    found = {(device.kind, device.arch): (where, device) for where, device in moving.devices() if device.kind != "cpu"}
    return list(found.values())


def why_none() -> str:
    return "; ".join(f"{name}: {backend.absent}" for name, backend in loaded.items() if backend.absent)


def executors(op: Op) -> list[Executor]:
    """The kernels of every device: "sm_90:cuda.triton". A source for executors.sources."""
    return [
        executor(op, kernel, device, where)
        for where, device in devices()
        for kernel in op.kernels
        if kernel.kind == device.kind
    ]


def is_here(executor: Executor | None) -> bool:
    """Whether one of `devices` runs it."""
    return executor is not None and executor.name.partition(":")[0] in {device.arch for _, device in devices()}


def executor(op: Op, kernel: Kernel, device: Device, where: torch.device) -> Executor:
    def run(*args: Any, **kwargs: Any) -> Any:
        named = dict(zip(op.params, args, strict=False)) | kwargs
        there = Mover(where)
        moved = {name: there(value) for name, value in named.items()}
        written = {id(there.storage(x)) for name in WRITTEN for x in tensors(named.get(name))}
        with moekern.use(kernel={op.name: kernel.name}):
            result = op(**moved)
        for before, after in there.storages():
            if id(after) in written:
                before.copy_(after)
            elif not torch.equal(before, after.to(before.device)):
                raise AssertionError("wrote to an operand")
        return there.back(result)

    def why_not(*args: Any, **kwargs: Any) -> str | None:
        there = Mover(where)
        return kernel.why_not(device, *op.prepare(*there(args), **there(kwargs)))

    name = f"{device.arch}:{kernel.name}"
    return Executor(op, name, run, kernel.lacks(device), why_not, asks=False, threads=(1, 1))
