"""A CUDA driver that does nothing (bench/subjects/stub_driver.c), to see what the host code asks of one."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moekern import _C

SOURCE = Path(__file__).parents[1] / "bench" / "subjects" / "stub_driver.c"


class Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("device", ctypes.c_int), ("cluster", ctypes.c_int), ("overlapped", ctypes.c_int),
        ("kernel", ctypes.c_char * 64),
    )  # fmt: skip


class Stub:
    """One library, in use while `used` lasts. Its variables are attributes: stub.launches is stub_launches."""

    def __init__(self, path: Path | str) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))

    def _variable(self, name: str) -> Any:
        kind = {"fails": ctypes.c_char * 64, "image": ctypes.c_char * 16, "load_nanoseconds": ctypes.c_long}
        return kind.get(name, ctypes.c_int).in_dll(self.library, f"stub_{name}")

    @property
    def launch(self) -> Launch:
        return Launch.in_dll(self.library, "stub_launch")

    def __getattr__(self, name: str) -> Any:
        return self._variable(name).value

    def set(self, **values: Any) -> None:
        for name, value in values.items():
            self._variable(name).value = value

    @contextlib.contextmanager
    def used(self) -> Iterator[Stub]:
        _C.native["cuda"]["use_driver"](str(self.path))
        try:
            yield self
        finally:
            _C.native["cuda"]["use_driver"](None)


_number = itertools.count()


def build(folder: Path, *flags: str) -> Stub:
    """A new one: nothing is loaded through it yet."""
    if "cuda" not in _C.native:
        pytest.skip("_C is built without kernels for CUDA")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    path = folder / f"stub_{next(_number)}.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", *flags, "-o", path, SOURCE], check=True)
    return Stub(path)


def row(op: str, name: str = "cuda.hopper") -> tuple[Any, Any]:
    """(run, refuses) of a kernel."""
    return next((run, refuses) for found, _, run, refuses, _ in _C.native["cuda"]["kernels"][op] if found == name)


def dequantize_call(rows: int = 32, columns: int = 64, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    import moekern

    return moekern.dequantize.prepare(moekern.per_block_cast_to_fp8(torch.ones(rows, columns)), None, dtype)
