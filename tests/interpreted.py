"""The Triton kernels for GPUs that are not here: the library's own launches, on CPU tensors, in Triton's interpreter.

The interpreter runs one program after another, so it shows what kernels compute and what they read and write, but
no races. Programs run in an order that changes from call to call, and memory that kernels are given is poisoned.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy
import torch
from executors import Executor

from moekern.backends._triton.kernels import Family, kernels, why_not
from moekern.backends._triton.targets import TARGETS
from moekern.op import Op

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

BACKENDS = {"sm_80": "cuda", "sm_90": "cuda", "gfx942": "rocm"}  # decoding, native, and native in another format
# Of so many cases of an op one is taken, on sm_90; of targets that differ only in how operands come to the matrix
# instruction, a ninth of these.
_EVERY = {
    "fp8_gemm_nt": 5, "m_grouped_fp8_gemm_nt_contiguous": 10, "m_grouped_fp8_gemm_nt_masked": 10,
    "k_grouped_fp8_gemm_tn_contiguous": 5, "fused_experts": 22, "moe_gate": 7, "moe_permute": 5, "moe_unpermute": 5,
}  # fmt: skip
_OTHER_OPS, _OTHER_TARGETS = 4, 9
_PROCESSORS = 5  # few programs, so that each has several tiles


def absent() -> str | None:
    if torch.cuda.is_available():
        return "a GPU is here: its kernels run on it"
    return why_not()


def executors(op: Op) -> list[Executor]:
    return [executor for name in BACKENDS for executor in of_target(name) if executor.op is op]


@functools.cache
def of_target(name: str) -> list[Executor]:
    backend = importlib.import_module(f"moekern.backends.{BACKENDS[name]}")
    target = replace(TARGETS[name], processors=_PROCESSORS)
    family = Family("cpu", name, lambda where: target, backend.tiles.choose, backend.tiles.choose_for_few_rows)
    return [_executor(op, kernel) for op, kernel in kernels(family)]


@contextlib.contextmanager
def interpreter() -> Iterator[None]:
    """In which kernels run."""
    _quicken()
    with mock.patch("torch.empty", _poisoned), _shuffled(), numpy.errstate(all="ignore"):
        yield


def _executor(op: Op, kernel: Any) -> Executor:
    def run(*args: Any, **kwargs: Any) -> Any:
        call = op.prepare(*args, **kwargs)
        with interpreter():
            kernel.run(*call)
        return call[op.output_index]

    def refuses(*args: Any, **kwargs: Any) -> str | None:
        return kernel.refuses(*op.prepare(*args, **kwargs))

    every = _EVERY.get(op.name, _OTHER_OPS) * (1 if kernel.name.startswith("sm_90") else _OTHER_TARGETS)
    return Executor(op, kernel.name, run, absent(), refuses, every=lambda case: every)


_empty = torch.empty


def _poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
    """torch.empty, with NaN in every format."""
    x = _empty(*args, **kwargs)
    x.view(torch.uint8).fill_(0xFF) if x.dim() and x.numel() else x
    return x


_calls = itertools.count()


def _shuffled() -> Any:
    """Programs in their order, backwards, or from the middle on."""
    from triton.runtime.interpreter import interpreter_builder as builder

    set_grid_idx, call = builder.set_grid_idx, next(_calls)

    def shuffled(x: int, y: int, z: int) -> None:
        width = builder.grid_dim[0]
        set_grid_idx((x, width - 1 - x, (x + width // 2) % width)[call % 3], y, z)

    return mock.patch.object(builder, "set_grid_idx", shuffled)


@functools.cache
def _quicken() -> None:
    """Every call of a function in a kernel makes the interpreter patch Triton's language anew: a third of its time."""
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    patch, first = interpreter._patch_builtin, {}

    def once(package: Any, builder: Any, scope: Any) -> None:
        if package not in first:
            first[package] = next((name for name in dir(package) if is_builtin(getattr(package, name, None))), None)
        name = first[package]
        if name is not None and is_builtin(getattr(package, name)):
            patch(package, builder, scope)

    interpreter._patch_builtin = once
