"""The machine's limits, measured as contenders among the kernels: multiply-add peak, DRAM read, DRAM copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import moekern
from moekern import _C, Kernel
from timing.measure import Contender, Samples
from timing.stock import Copies, Stock

READ_BYTES = 32 << 20  # several milliseconds on two channels, and some copies in every pool


@dataclass(frozen=True)
class Peaks:
    """Work per second."""

    read: float  # bytes
    copy: float  # bytes read plus bytes written
    multiply_add: float  # floating-point operations, in the kernel's own instruction set

    def seconds(self, flops: int, bytes: int, moves: str) -> float:
        """The least time for a call that `moves` ("read" or "copy") these bytes and does these operations."""
        return max(flops / self.multiply_add, bytes / getattr(self, moves))

    def binds(self, flops: int, bytes: int, moves: str) -> str:
        return "fma" if flops / self.multiply_add > bytes / getattr(self, moves) else moves


class Limits:
    """Contenders for one comparison, and what their samples say.

    Reading and copying use the best instruction set of the machine, the multiply-add peak that of
    the kernel under test.
    """

    def __init__(self, stock: Stock, kernels: list[Kernel], copying: bool) -> None:
        features = moekern.devices()[0].features
        rows = {needs: (add, reads, copy) for _, needs, add, reads, copy in _C.native["cpu"]["limits"]}
        self._needs = {kernel.name: kernel.needs for kernel in kernels}
        for kernel in kernels:
            if kernel.needs not in rows:
                raise LookupError(f"no multiply-add limit for {kernel.name} (needs {sorted(kernel.needs)})")
        best = next(loops for needs, loops in rows.items() if needs <= features)
        chunks = stock.fp8.copies(1, READ_BYTES)
        self._amount: dict[str, int] = {}
        self._reads = [f"limit read {i}" for i, _ in enumerate(best[1])]
        self.contenders = [
            Contender(name, partial(_read_next, read, chunks)) for name, read in zip(self._reads, best[1], strict=True)
        ]
        if copying:
            out = stock.outputs(1, READ_BYTES, torch.float8_e4m3fn)
            self._amount["copy"] = 2 * READ_BYTES
            self.contenders.append(Contender("limit copy", lambda turn: best[2](chunks.next(), out.next())))
        for needs in dict.fromkeys(self._needs.values()):
            add = rows[needs][0]
            self._amount[_fma(needs)] = add()
            self.contenders.append(Contender(f"limit {_fma(needs)}", _ignore_turn(add)))

    def peaks(self, kernel: Kernel, samples: dict[str, Samples]) -> Peaks:
        def rate(what: str) -> float:
            return self._amount[what] / samples[f"limit {what}"].median if what in self._amount else float("nan")

        read = READ_BYTES / min(samples[name].median for name in self._reads)  # the fastest loop
        return Peaks(read, rate("copy"), rate(_fma(self._needs[kernel.name])))


def _fma(needs: frozenset[str]) -> str:
    return f"fma {'+'.join(sorted(needs)) or 'scalar'}"


def _read_next(read: Callable[[torch.Tensor], None], chunks: Copies[torch.Tensor], turn: int) -> None:
    read(chunks.next())


def _ignore_turn(call: Callable[[], object]) -> Callable[[int], object]:
    return lambda turn: call()
