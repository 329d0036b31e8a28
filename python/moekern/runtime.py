"""Connects the native module to torch: how tensors are read and allocated, how many threads to use."""

from __future__ import annotations

import torch

from moekern import _C
from moekern.scaled import FORMATS, ScaledTensor

_NAMES: dict[torch.dtype, str] = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float8_e8m0fnu: "ue8m0",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    **FORMATS,
}
_BY_NAME = {name: dtype for dtype, name in _NAMES.items()}
_DLPACK_DEVICES = {"cpu": 1, "cuda": 2, "npu": 12}


def _read(x: torch.Tensor) -> tuple[int, list[int], list[int], str, int]:
    """What the DLPack exchange table says of a tensor, for a torch that has none (before 2.10)."""
    device = _DLPACK_DEVICES.get(x.device.type, 0) | (x.device.index or 0) << 16
    return x.data_ptr(), list(x.shape), list(x.stride()), _NAMES.get(x.dtype, "other"), device


def _allocate(like: torch.Tensor, shape: tuple[int, ...], name: str) -> torch.Tensor:
    return torch.empty(shape, dtype=_BY_NAME[name], device=like.device)


def _current_stream(device_type: int, index: int) -> int:
    """The handle of the stream that kernels are to be queued on."""
    kind = next(kind for kind, number in _DLPACK_DEVICES.items() if number == device_type)
    stream = getattr(torch, kind).current_stream(index)
    return stream.npu_stream if kind == "npu" else stream.cuda_stream


def connect(num_threads: int | None = None) -> None:
    """Bind _C. `num_threads` fixes the number of CPU threads; None follows torch.get_num_threads()."""
    count = torch.get_num_threads if num_threads is None else lambda: num_threads
    _C.connect(ScaledTensor, torch.Tensor, count, _read, _allocate, _current_stream, _NAMES)
