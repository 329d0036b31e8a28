"""Which of an op's cases the kernels for Hopper are given here, executed by the emulated driver."""

from __future__ import annotations

import ctypes
import json
from typing import Any
from unittest import mock

import emulated
import emulated_driver
import pytest
import torch
from executors import Executor

from moekern.op import Op

emulation = pytest.mark.skipif(emulated.absent() is not None, reason=str(emulated.absent()))


def executor_of(op: Op, name: str = "hopper") -> Executor:
    [executor] = [executor for executor in emulated.executors(op) if executor.name == f"{emulated.TARGET}.{name}"]
    return executor


def launched() -> str:
    """The kernel that ran last."""
    said = emulated_driver.library().moekern_emulator_statistics
    said.restype = ctypes.c_char_p
    return str(json.loads(said())["kernel"])


def run_with(op: Op, changed: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
    """A call whose operands became others after they had been checked, as on an accelerator, where nobody looks."""
    prepare = op.prepare

    def prepared(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        call = dict(zip(op.params, prepare(*args, **kwargs), strict=True))
        return tuple((call | changed).values())

    with mock.patch.object(op, "prepare", prepared):
        return executor_of(op)(*args, **kwargs)
