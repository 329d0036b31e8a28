"""Memory for intermediate results: the caller's, or torch's."""

from __future__ import annotations

import math
from typing import Any

import torch


class Workspace:
    """Hands out parts of `memory` (uint8), one after another; of none, new tensors."""

    ALIGNED = 256  # bytes: what torch's allocator aligns to, and more than any load needs

    def __init__(self, memory: torch.Tensor | None, device: Any) -> None:
        self._memory, self._device, self._used = memory, device, 0
        if memory is not None:
            self._used = -memory.data_ptr() % self.ALIGNED

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if self._memory is None:
            return torch.empty(shape, dtype=dtype, device=self._device)
        count = math.prod(shape) * dtype.itemsize
        part = self._memory[self._used : self._used + count]
        if len(part) < count:
            raise ValueError(
                f"fused_experts: workspace has {len(self._memory)} bytes; see moekern.fused_experts_workspace"
            )
        self._used += -(-count // self.ALIGNED) * self.ALIGNED
        return part.view(dtype).view(shape)
