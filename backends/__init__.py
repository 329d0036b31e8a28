"""Device families. Each is a package with `probe() -> list[Device] | str` and `register()`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field

import torch

from moekern.op import Device, register_device

NAMES = ("cpu", "cuda", "rocm", "ascend")


@dataclass
class Backend:
    """What loading one family came to."""

    name: str
    devices: list[Device] = field(default_factory=list)
    absent: str | None = None  # why there are no devices


loaded: dict[str, Backend] = {}


def load() -> None:
    """Probe every family. A missing SDK, driver or device is a recorded reason, never an exception."""
    for name in NAMES:
        backend = loaded[name] = Backend(name)
        try:
            module = importlib.import_module(f"moekern.backends.{name}")
            found = module.probe()
            if isinstance(found, str):
                backend.absent = found
                continue
            module.register()
        except Exception as error:  # a broken driver may raise anything at all
            if name == "cpu":
                raise
            backend.absent = f"{type(error).__name__}: {error}"
            continue
        backend.devices = found
        for device in found:
            for where in module.torch_devices(device):
                register_device(torch.device(where), device)


def devices() -> list[Device]:
    """Every device that a backend found, the CPU first. `python -m moekern info` says why others are absent."""
    return [device for backend in loaded.values() for device in backend.devices]
