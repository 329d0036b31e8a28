"""The emulated driver with something wrong: other PTX for one module, or one tensor map that is not what was asked for.

It is a small library in front of the emulator (native/altered_driver.cpp), in a folder of its own: where a driver lies,
the library looks for PTX. Loaded once more for every alteration, so that nothing is remembered from one to the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import emulated_driver

SOURCE = Path(__file__).parent / "native" / "altered_driver.cpp"
FIELDS = {"box": 1, "swizzle": 2, "extent": 3, "stride": 4}


@dataclass(frozen=True)
class MapChange:
    """Of the tensor map that is encoded as number `map`: `addend` more in a field."""

    map: int
    field: str
    index: int
    addend: int

    def __str__(self) -> str:
        return f"tensor map {self.map}: {self.field}[{self.index}] {self.addend:+d}"


class _Alteration(ctypes.Structure):
    _fields_ = (
        ("map", ctypes.c_int), ("field", ctypes.c_int), ("index", ctypes.c_int), ("addend", ctypes.c_int64)
    )  # fmt: skip


@functools.cache
def _compiled() -> Path:
    folder = tempfile.TemporaryDirectory()
    made = Path(folder.name, "driver.so")
    emulator = emulated_driver.path()
    linked = ["-Wl,--no-as-needed", f"-Wl,-rpath,{emulator.parent}", emulator, "-ldl"]
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-shared", "-fPIC", "-o", made, SOURCE, *linked]
    subprocess.run([str(part) for part in command], check=True)
    _kept.append(folder)
    return made


_kept: list[tempfile.TemporaryDirectory[str]] = []


@contextlib.contextmanager
def altered(ptx: dict[str, str] | None = None, change: MapChange | None = None) -> Iterator[ctypes.c_int]:
    """In which emulated.py uses such a driver. Yields the number of tensor maps encoded so far.

    ptx: module -> its text, instead of what was compiled.
    """
    original = emulated_driver.path()
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "driver.so")
        shutil.copy(_compiled(), library)
        for file in original.parent.glob("*.ptx"):
            Path(folder, file.name).symlink_to(file)
        for module, text in (ptx or {}).items():
            path = Path(folder, f"{module}.ptx")
            path.unlink()
            path.write_text(text)
        loaded = ctypes.CDLL(str(library))
        if change is not None:
            alteration = _Alteration.in_dll(loaded, "moekern_alteration")
            alteration.map, alteration.field = change.map, FIELDS[change.field]
            alteration.index, alteration.addend = change.index, change.addend
        emulated_driver.library()  # the emulator itself, whose settings hold for both
        with mock.patch.object(emulated_driver, "path", lambda: library):
            yield ctypes.c_int.in_dll(loaded, "moekern_maps")
