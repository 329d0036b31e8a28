"""Compiling for a device that need not be here: Triton asks its driver which one, so it is given one that answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from moekern.backends._triton.targets import Target


class Absent:
    """As much of a Triton driver as compiling takes."""

    def __init__(self, target: Target) -> None:
        self._target = GPUTarget(target.backend, target.arch, target.warp_size)

    def get_current_device(self) -> Any:
        return self._target  # kernels keep what they compiled by device, so a target must not pass for device 0

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


@contextlib.contextmanager
def active(instead: Any) -> Iterator[None]:
    """`instead` in place of Triton's driver, for all threads."""
    before = driver._active  # `driver.active` would look for a device
    driver.set_active(instead)
    try:
        yield
    finally:
        driver._active = before
