"""The emulated CUDA driver, through ctypes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_NAME = "libmoekern_emulator.so"
_lock = threading.RLock()  # settings and memory are the process's

SETTINGS: Mapping[str, Any] = {
    "schedule": "round_robin",
    "seed": 0,
    "races": 1,
    "poison": 1,
    "sms": 8,
    "accumulation": "exact",
    "patience": 5_000_000,
    "strict": 0,
}


class Fault(RuntimeError):
    """What went wrong: in which kernel, CTA, warp, lane, and at which line of the PTX."""


def library_path() -> Path:
    """Where the emulator's library is. The environment variable MOEKERN_CUDA_DRIVER names another."""
    if named := os.environ.get("MOEKERN_CUDA_DRIVER"):
        return Path(named)
    from moekern import _C

    # Where the installer put it: an editable install keeps native files apart from Python's.
    return Path(_C.__file__).parent / "backends" / "cuda" / "emulator" / _NAME


@functools.cache
def library() -> Any:
    path = library_path()
    if not path.exists():
        raise RuntimeError(
            f"there is no {path}: this build of moekern has no emulator. Build with MOEKERN_EMULATOR=ON, or by itself "
            "(cmake -S backends/cuda/emulator -B build && cmake --build build) and name it with MOEKERN_CUDA_DRIVER."
        )
    driver = ctypes.CDLL(str(path))
    if not hasattr(driver, "moekern_emulator_fault"):
        raise RuntimeError(f"{path} is no emulator of moekern's")
    for name in ("fault", "statistics", "describe"):
        getattr(driver, f"moekern_emulator_{name}").restype = ctypes.c_char_p
    return driver


def check(result: int) -> None:
    if result:
        raise Fault(library().moekern_emulator_fault().decode() or f"error {result} of the emulated driver")


@contextlib.contextmanager
def configured(settings: Mapping[str, Any], memory: list[tuple[int, int, bool]]) -> Iterator[Any]:
    """The library, with these settings and this memory (address, bytes, whether it may be written), for one launch."""
    driver = library()
    with _lock:
        try:
            for name, value in {**SETTINGS, "strict": 1, **settings}.items():
                value = int(value) if isinstance(value, bool) else value
                if not driver.moekern_emulator_set(name.encode(), str(value).encode()):
                    raise ValueError(f"{name}={value!r}: the emulator has no such setting")
            for address, size, writable in memory:
                driver.moekern_emulator_allow(ctypes.c_uint64(address), ctypes.c_uint64(size), int(writable))
            yield driver
        finally:
            driver.moekern_emulator_forget_all()
            for name, value in SETTINGS.items():
                driver.moekern_emulator_set(name.encode(), str(value).encode())
