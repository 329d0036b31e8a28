"""Compiles what calls launch, into Triton's cache on disk, before anybody waits for it.

A call is made on a device that need not be here and that does nothing. So plans, tiles and specialisation are those of
a launch, and so is the key in Triton's cache, if the launch's tensors begin at multiples of 16 bytes, as torch's do.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from triton import knobs

from moekern.backends._triton import ahead
from moekern.backends._triton.kernels import Family, kernels, taking
from moekern.backends._triton.targets import Target
from moekern.op import Op


@dataclass(frozen=True)
class Compiled:
    """kernel: Triton's function. cached: the disk had it."""

    kernel: str
    seconds: float
    cached: bool


@dataclass(frozen=True)
class Done:
    kernel: str | None  # that the library takes; None: it has none for this call
    compiled: list[Compiled]  # what calls before it had not brought already
    failure: str | None = None


class Warmup:
    """For devices of one architecture. During a call, no thread may launch kernels."""

    def __init__(self, target: Target) -> None:
        self._driver = ahead.Absent(target)
        self._kernels = list(kernels(family_of(target)))

    def call(self, op: Op, prepared: tuple[Any, ...]) -> Done:
        """prepared: by `op.prepare`, of operands in CPU memory, which is not touched."""
        kernel = taking(self._kernels, op, prepared)
        if kernel is None:
            return Done(None, [])
        compiled: list[Compiled] = []
        try:
            with ahead.active(self._driver), _listening(compiled):
                kernel.run(*prepared)
        except Exception as error:  # the compiler's own have no common class
            return Done(kernel.name, compiled, f"{type(error).__name__}: {' '.join(str(error).split())}")
        return Done(kernel.name, compiled)


def family_of(target: Target) -> Family:
    """Of the backend whose devices the target stands for."""
    backend = importlib.import_module(f"moekern.backends.{'rocm' if target.backend == 'hip' else 'cuda'}")
    return replace(backend.FAMILY, target_of=lambda where: target)


def folder() -> str:
    """Where Triton keeps what it compiles."""
    return str(knobs.cache.dir)


@contextlib.contextmanager
def _listening(compiled: list[Compiled]) -> Iterator[None]:
    """Puts there what Triton compiles or finds on disk."""
    before, last = knobs.compilation.listener, time.perf_counter()

    def listen(*, src: Any, cache_hit: bool, **rest: Any) -> None:
        nonlocal last
        now = time.perf_counter()
        compiled.append(Compiled(src.name, now - last, cache_hit))
        last = now
        if before is not None:
            before(src=src, cache_hit=cache_hit, **rest)

    knobs.compilation.listener = listen
    try:
        yield
    finally:
        knobs.compilation.listener = before
