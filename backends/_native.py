"""Kernels of the native module, as the ops have them."""

from __future__ import annotations

from moekern import _C
from moekern.op import Kernel
from moekern.ops import OPS


def register(name: str, kind: str) -> None:
    """Those of the backend `name` of _C, for devices of a kind."""
    for op in OPS:
        for kernel, needs, run, refuses, workspace in _C.native[name]["kernels"].get(op.name, []):
            op.add(Kernel(kernel, run, kind, needs, refuses, kernel.endswith("_stream"), workspace))
