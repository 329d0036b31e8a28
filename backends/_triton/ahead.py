"""Compiling for a device that need not be here: Triton asks its driver which one, so it is given one that answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from moekern.backends._triton.targets import Target


class Absent:
    """A Triton driver of a device that is not here: kernels compile for it, and launching them does nothing."""

    def __init__(self, target: Target) -> None:
        self._target = GPUTarget(target.backend, target.arch, target.warp_size)
        properties = {"max_shared_mem": target.shared_memory}
        self.utils = SimpleNamespace(
            load_binary=lambda name, kernel, shared, device: ("module", "function", 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: properties,
        )

    def get_current_device(self) -> Any:
        return self._target  # kernels keep what they compiled by device, so a target must not pass for device 0

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What calls the driver, for one compiled kernel."""
        return _nothing


def _nothing(*launch: Any) -> None:
    pass


@contextlib.contextmanager
def active(instead: Any) -> Iterator[None]:
    """`instead` in place of Triton's driver, for all threads."""
    before = driver._active  # `driver.active` would look for a device
    driver.set_active(instead)
    try:
        yield
    finally:
        driver._active = before
