"""Cold operands: views into flat pools of random values that are larger than every cache."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch

from moekern import ScaledTensor, per_token_cast_to_fp8

T = TypeVar("T")
PAGE = 4096
# Gaussian values repeat with this period: two primes, so that no row of any matrix equals another.
PATTERN = (1021, 8209)
WEIGHT_SIGMA = 0.02


def _round_up(x: int, unit: int) -> int:
    return -(-x // unit) * unit


class _Pool:
    """`numel` elements of `pattern` over and over, and the place up to which they have been handed out."""

    def __init__(self, pattern: torch.Tensor, numel: int) -> None:
        self.flat = torch.empty(numel, dtype=pattern.dtype)
        self.place = 0
        whole, source = self._bits(self.flat), self._bits(pattern.flatten())
        for start in range(0, numel, source.numel()):
            part = whole[start : start + source.numel()]
            part.copy_(source[: part.numel()])

    @staticmethod
    def _bits(x: torch.Tensor) -> torch.Tensor:
        return x.view(torch.uint8) if x.element_size() == 1 else x

    def copies(self, rows: int, cols: int) -> Copies[torch.Tensor]:
        """Disjoint [rows, cols] views that fill the pool, whole pages apart."""
        step = _round_up(rows * cols, PAGE // self.flat.element_size())
        starts = range(0, self.flat.numel() - step + 1, step)
        return Copies(self, step, [self.flat[i : i + rows * cols].view(rows, cols) for i in starts])


class Copies(Generic[T]):
    """Operands of one shape in a pool. `next` goes round the pool, at one place for all shapes that lie in it.

    To reach an operand of its own grid it skips less than that operand's length: at least half of the
    pool, but for an operand at its end, is handed out before any byte comes round again.
    """

    def __init__(self, pool: _Pool, step: int, items: list[T]) -> None:
        self.pool, self.step, self.items = pool, step, items

    def next(self) -> T:
        i = -(-self.pool.place // self.step)
        if i >= len(self.items):
            i = 0
        self.pool.place = (i + 1) * self.step
        return self.items[i]


class Stock:
    """Weights, activations and outputs, each in enough copies that the next one comes from DRAM.

    cold: bytes that pass before a byte is used again. largest: elements of the largest operand.
    """

    def __init__(self, cold: int, largest: int) -> None:
        self.cold = cold
        self.numel = 2 * cold + 2 * _round_up(largest, PAGE)
        self._gaussian = torch.randn(PATTERN)
        # Quantised like weights, not random bytes: those would be subnormal or huge far too often.
        self.fp8 = _Pool(per_token_cast_to_fp8(self._gaussian).data, self.numel)
        self._bf16: _Pool | None = None
        self._written: dict[torch.dtype, _Pool] = {}

    def weights(self, n: int, k: int, block: tuple[int, int] = (128, 128)) -> Copies[ScaledTensor]:
        """Copies of FP8 weights with their own random scales, sigma about 0.02 as in trained layers."""
        grid = (-(-n // block[0]), -(-k // block[1]))
        typical = WEIGHT_SIGMA / 110  # 448 is about 4 sigma of the FP8 values
        data = self.fp8.copies(n, k)
        items = [ScaledTensor(item, typical * (0.5 + torch.rand(grid)), block) for item in data.items]
        return Copies(self.fp8, data.step, items)

    def activations(self, m: int, k: int) -> Copies[torch.Tensor]:
        """Copies of bf16 activations."""
        if self._bf16 is None:
            self._bf16 = _Pool(self._gaussian.bfloat16(), self.numel)
        return self._bf16.copies(m, k)

    def outputs(self, rows: int, cols: int, dtype: torch.dtype) -> Copies[torch.Tensor]:
        """Copies to write to, their pages already there."""
        if dtype not in self._written:
            self._written[dtype] = _Pool(torch.zeros(PAGE, dtype=torch.float32).to(dtype), self.numel)
        return self._written[dtype].copies(rows, cols)
