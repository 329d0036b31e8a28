"""Whether this build of moekern has the emulator."""

from __future__ import annotations


def here() -> bool:
    from moekern.backends.cuda.emulator import library_path

    return library_path().exists()
