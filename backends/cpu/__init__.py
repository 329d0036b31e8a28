"""CPUs: native kernels from kernels.inc, chosen by the features found at run time."""

from __future__ import annotations

import platform

from moekern import _C
from moekern.backends import _native
from moekern.op import Device


def probe() -> list[Device]:
    arch = platform.machine().lower().replace("amd64", "x86_64")
    return [Device("cpu", arch, _C.native["cpu"]["features"](), name=platform.processor() or arch)]


def torch_devices(device: Device) -> list[str]:
    return ["cpu"]


def register() -> None:
    _native.register("cpu", "cpu")
