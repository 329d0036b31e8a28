"""Launches on a GPU that is not here: kernels compile for it, and what its driver would be asked is kept.

Triton compiles nothing where TRITON_INTERPRET was set when it came, so this needs a process of its own: `apart`.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

STREAM = 7  # the handle of its current stream


@dataclass(frozen=True)
class Launched:
    kernel: str
    compiled_in: set[str]  # the arguments that are
    aligned: set[str]  # those that are assumed to be multiples of 16
    grid: tuple[int, int, int]
    stream: int
    values: tuple[Any, ...]  # of all arguments, in the kernel's order


def driver(target: str = "sm_90") -> Any:
    """An `ahead.Absent` with a list `launched`."""
    from moekern.backends._triton.ahead import Absent
    from moekern.backends._triton.targets import TARGETS

    class Recorder(Absent):
        def __init__(self) -> None:
            super().__init__(TARGETS[target])
            self.launched: list[Launched] = []

        def get_current_stream(self, device: Any) -> int:
            return STREAM

        def launcher_cls(self, source: Any, metadata: Any) -> Any:
            names = source.fn.arg_names
            constant = {name for name, kind in source.signature.items() if kind == "constexpr"}
            aligned = {names[place] for (place, *_), found in source.attrs.items() if found}

            def launch(x: int, y: int, z: int, stream: int, function: Any, packed: Any, said: Any, *rest: Any) -> None:
                enter, leave, *values = rest
                if enter is not None:
                    enter(said)
                launched = Launched(metadata.name, constant, aligned, (x, y, z), stream, tuple(values))
                self.launched.append(launched)
                if leave is not None:
                    leave(said)

            return launch

    return Recorder()


def apart(cache: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """Its result in a new process, with a cache of Triton's there."""
    ours = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with (
        mock.patch.dict(os.environ, {**ours, "TRITON_CACHE_DIR": str(cache)}, clear=True),
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
    ):
        return pool.submit(function, *arguments).result()
