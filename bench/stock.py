"""Cold operands: views into flat pools of random values that are larger than every cache."""

from __future__ import annotations

import torch

from moekern import ScaledTensor, per_token_cast_to_fp8

PAGE = 4096
# Gaussian values repeat with this period: two primes, so that no row of any matrix equals another.
PATTERN = (1021, 8209)
WEIGHT_SIGMA = 0.02


def _round_up(x: int, unit: int) -> int:
    return -(-x // unit) * unit


class _Pool:
    """`numel` elements of `pattern` over and over, and the right to view any of them as a matrix."""

    def __init__(self, pattern: torch.Tensor, numel: int) -> None:
        self.flat = torch.empty(numel, dtype=pattern.dtype)
        whole, source = self._bits(self.flat), self._bits(pattern.flatten())
        for start in range(0, numel, source.numel()):
            part = whole[start : start + source.numel()]
            part.copy_(source[: part.numel()])

    @staticmethod
    def _bits(x: torch.Tensor) -> torch.Tensor:
        return x.view(torch.uint8) if x.element_size() == 1 else x

    def copies(self, rows: int, cols: int, most_bytes: int) -> list[torch.Tensor]:
        """Disjoint [rows, cols] views, page-aligned, that together make up at most `most_bytes`, but two at least."""
        step = _round_up(rows * cols, PAGE // self.flat.element_size())
        count = min(self.flat.numel(), max(most_bytes // self.flat.element_size(), 2 * step)) // step
        return [self.flat[i * step : i * step + rows * cols].view(rows, cols) for i in range(count)]


class Stock:
    """Weights, activations and outputs, each in enough copies that taking turns finds them in DRAM.

    cold: bytes that pass between two uses of one copy. largest: elements of the largest operand.
    """

    def __init__(self, cold: int, largest: int) -> None:
        self.cold = cold
        self.numel = cold + 2 * _round_up(largest, PAGE)
        self._gaussian = torch.randn(PATTERN)
        # Quantised like weights, not random bytes: those would be subnormal or huge far too often.
        self.fp8 = _Pool(per_token_cast_to_fp8(self._gaussian).data, self.numel)
        self._bf16: _Pool | None = None
        self._written: dict[torch.dtype, _Pool] = {}

    def weights(self, n: int, k: int, block: tuple[int, int] = (128, 128)) -> list[ScaledTensor]:
        """Copies of FP8 weights with their own random scales, sigma about 0.02 as in trained layers."""
        grid = (-(-n // block[0]), -(-k // block[1]))
        typical = WEIGHT_SIGMA / 110  # 448 is about 4 sigma of the FP8 values
        return [
            ScaledTensor(data, typical * (0.5 + torch.rand(grid)), block)
            for data in self.fp8.copies(n, k, self.cold + n * k)
        ]

    def activations(self, m: int, k: int) -> list[torch.Tensor]:
        """Copies of bf16 activations."""
        if self._bf16 is None:
            self._bf16 = _Pool(self._gaussian.bfloat16(), self.numel)
        return self._bf16.copies(m, k, self.cold + 2 * m * k)

    def outputs(self, rows: int, cols: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """Copies to write to, their pages already there."""
        if dtype not in self._written:
            self._written[dtype] = _Pool(torch.zeros(PAGE, dtype=torch.float32).to(dtype), self.numel)
        return self._written[dtype].copies(rows, cols, self.cold + rows * cols * dtype.itemsize)
