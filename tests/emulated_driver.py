"""The emulator's settings for launches that are the library's own."""

from __future__ import annotations

from typing import Any

from moekern.backends.cuda.emulator.driver import library
from moekern.backends.cuda.emulator.driver import library_path as path

__all__ = ["configure", "library", "path"]


def configure(**settings: Any) -> None:
    """schedule, seed, races, poison, sms, ... of all launches from now on."""
    for name, value in settings.items():
        if not library().moekern_emulator_set(name.encode(), str(value).encode()):
            raise ValueError(f"the emulator has no setting {name}={value}")
