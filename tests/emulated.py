"""The hand-written kernels for GPUs that are not here: the library's own host code, on CPU tensors, with an emulated
driver that executes their PTX.

What a call may touch is known to the emulator: the elements of its operands, and writable ones only of its outputs. The
order in which warps run changes from call to call, and memory that kernels are given is poisoned.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Iterator
from typing import Any

import emulated_driver
import torch
from executors import Executor

from moekern import _C, GroupedLayout
from moekern.op import Op
from moekern.testing.moving import tensors

TARGET = "sm_90"
WRITTEN = ("out", "workspace")  # parameters of ops
_PROCESSORS = 5  # few, so that each has several tiles
# Of so many cases of an op one is taken; of those with aligned rows, which take other kernels, all.
_EVERY, _OTHER_OPS = {"dequantize": 1, "moe_permute": 2}, 4
_SCHEDULES = ("round_robin", "random", "producer_greedy", "consumer_greedy")


def absent() -> str | None:
    """Why these kernels cannot be executed here, or None."""
    if "cuda" not in _C.native:
        return "_C is built without kernels for CUDA (MOEKERN_CUDA)"
    if not emulated_driver.path().exists():
        return "the emulated driver is not built (MOEKERN_EMULATOR)"
    return None


def executors(op: Op) -> list[Executor]:
    """ "sm_90.hopper" and what else there is."""
    rows = _C.native["cuda"]["kernels"].get(op.name, []) if "cuda" in _C.native else []
    return [_executor(op, *row) for row in rows]


def _executor(op: Op, name: str, needs: Any, run: Any, refuses: Any, workspace: Any) -> Executor:
    def emulated(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(op.params, args, strict=False)) | kwargs
        call = list(op.prepare(*args, **kwargs))
        if given.get("out") is None:
            _poison(op, call)
        if workspace is not None and given.get("workspace") is None:
            call[op.params.index("workspace")] = torch.full((workspace(*call),), 0xFF, dtype=torch.uint8)
        with driver(), _allowed(op, call):
            run(*call)
        return call[op.output_index]

    def why_not(*args: Any, **kwargs: Any) -> str | None:
        return refuses(*op.prepare(*args, **kwargs)) if refuses else None

    def every(case: Any) -> int:
        return 1 if getattr(case, "layout", None) == "aligned" else _EVERY.get(op.name, _OTHER_OPS)

    return Executor(op, name.replace("cuda", TARGET), emulated, absent(), why_not, threads=(1, 1), every=every)


def _poison(op: Op, call: list[Any]) -> None:
    """A fresh output is NaN in every format, but for rows of groups that have fewer: the op has zeroed those."""
    for x in tensors(call[op.output_index]):
        layout = next((part for part in call if isinstance(part, GroupedLayout)), None)
        if layout is None or op.name.startswith("k_"):
            parts = [x]
        elif layout.capacity is None:
            parts = [x[s : s + c] for s, c in zip(layout.starts.tolist(), layout.counts.tolist(), strict=True)]
        else:
            parts = [x[g, :c] for g, c in enumerate(layout.counts.tolist())]
        for part in parts:
            part.view(torch.uint8).fill_(0xFF)


_calls = itertools.count()


@contextlib.contextmanager
def driver() -> Iterator[None]:
    """In which the host code finds the emulated driver; schedule and seed are another's every time."""
    call = next(_calls)
    emulated_driver.configure(schedule=_SCHEDULES[call % len(_SCHEDULES)], seed=call, sms=_PROCESSORS)
    use = _C.native["cuda"]["use_driver"]
    use(str(emulated_driver.path()))
    try:
        yield
    finally:
        use(None)


@contextlib.contextmanager
def _allowed(op: Op, call: list[Any]) -> Iterator[None]:
    """What kernels may touch: from the first to the last element of each operand."""
    emulator = emulated_driver.library()
    emulated_driver.configure(strict=1)
    for name, value in zip(op.params, call, strict=True):
        for x in tensors(value):
            if x.numel():
                last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
                size = (last + 1) * x.element_size()
                emulator.moekern_emulator_allow(ctypes.c_uint64(x.data_ptr()), ctypes.c_uint64(size), name in WRITTEN)
    try:
        yield
    finally:
        emulator.moekern_emulator_forget_all()
