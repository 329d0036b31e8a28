"""The emulated driver, called as programs call libcuda: PTX of any origin, launched on memory of this process."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_DYNAMIC_SHARED_BYTES = 8  # CUfunction_attribute

Memory = tuple[int, int, bool]  # address, bytes, whether a kernel may write there


class Fault(RuntimeError):
    """What went wrong, in the emulator's words."""


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint),
    )  # fmt: skip


def path() -> Path:
    if named := os.environ.get("MOEKERN_CUDA_DRIVER"):
        return Path(named)
    from moekern import _C

    return Path(_C.__file__).parent / "backends" / "cuda" / "emulator" / "libmoekern_emulator.so"


@functools.cache
def library() -> Any:
    driver = ctypes.CDLL(str(path()))
    driver.moekern_emulator_fault.restype = ctypes.c_char_p
    _check(driver, driver.cuInit(0), "cuInit")
    return driver


def _check(driver: Any, result: int, what: str) -> None:
    if result:
        raise Fault(f"{what}: error {result}: {driver.moekern_emulator_fault().decode()}")


def configure(**settings: Any) -> None:
    """schedule, seed, races, poison, sms, ... of all launches from now on."""
    for name, value in settings.items():
        if not library().moekern_emulator_set(name.encode(), str(value).encode()):
            raise ValueError(f"the emulator has no setting {name}={value}")


class Module:
    """PTX text, loaded until the object goes."""

    def __init__(self, text: str) -> None:
        self._driver, self._module = library(), ctypes.c_void_p()
        _check(
            self._driver, self._driver.cuModuleLoadData(ctypes.byref(self._module), text.encode()), "cuModuleLoadData"
        )

    def __del__(self) -> None:
        if self._module:
            self._driver.cuModuleUnload(self._module)

    def launch(
        self,
        kernel: str,
        grid: Sequence[int],
        threads: int,
        parameters: Iterable[Any],
        memory: Iterable[Memory],
        shared_bytes: int = 0,
    ) -> None:
        """parameters: bytes, or values of ctypes. memory: all that the kernel may touch."""
        driver, function = self._driver, ctypes.c_void_p()
        _check(driver, driver.cuModuleGetFunction(ctypes.byref(function), self._module, kernel.encode()), kernel)
        _check(driver, driver.cuFuncSetAttribute(function, _DYNAMIC_SHARED_BYTES, shared_bytes), kernel)
        x, y, z, *_ = *grid, 1, 1
        config = _Config((x, y, z), (threads, 1, 1), shared_bytes, None, None, 0)
        values = [_aligned(value) if isinstance(value, bytes) else value for value in parameters]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        driver.moekern_emulator_set(b"strict", b"1")
        for address, size, writable in memory:
            driver.moekern_emulator_allow(ctypes.c_uint64(address), ctypes.c_uint64(size), writable)
        try:
            _check(driver, driver.cuLaunchKernelEx(ctypes.byref(config), function, pointers, None), kernel)
        finally:
            driver.moekern_emulator_forget_all()


def _aligned(content: bytes) -> Any:
    return (ctypes.c_char * len(content)).from_buffer_copy(content)


def tensor_map(
    address: int, extents: Sequence[int], strides: Sequence[int], box: Sequence[int], swizzle: int, kind: int = 0
) -> bytes:
    """Of bytes, or another CUtensorMapDataType. Dimension 0 is the contiguous one; strides are those of the others."""
    driver, rank = library(), len(extents)
    room = (ctypes.c_uint8 * 192)()
    at = -(-ctypes.addressof(room) // 64) * 64
    result = driver.cuTensorMapEncodeTiled(
        ctypes.c_void_p(at), kind, rank, ctypes.c_void_p(address), (ctypes.c_uint64 * rank)(*extents),
        (ctypes.c_uint64 * max(rank - 1, 1))(*strides), (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank), 0, swizzle, 0, 0,
    )  # fmt: skip
    _check(driver, result, "cuTensorMapEncodeTiled")
    return ctypes.string_at(at, 128)
