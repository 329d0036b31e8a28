"""Memory of the process as kernels see it: NumPy arrays and CPU tensors of torch."""

from __future__ import annotations

from typing import Any


def is_array(x: Any) -> bool:
    return hasattr(x, "__array_interface__") or hasattr(x, "untyped_storage")


def memory_of(x: Any) -> tuple[int, int, bool]:
    """Address, bytes up to the last element, and whether it may be written."""
    if hasattr(x, "untyped_storage"):
        if x.device.type != "cpu":
            raise ValueError(f"a tensor on {x.device}: the emulator works in CPU memory")
        address, shape, itemsize, writable = x.data_ptr(), tuple(x.shape), x.element_size(), True
        strides = tuple(s * itemsize for s in x.stride())
    else:
        interface = x.__array_interface__
        address, read_only = interface["data"]
        shape, itemsize, writable = tuple(x.shape), x.itemsize, not read_only
        strides = tuple(x.strides)
    if any(s < 0 for s in strides):
        raise ValueError("an array with a negative stride: a kernel gets its first element's address")
    if 0 in shape:
        return address, 0, writable
    return address, itemsize + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)), writable


def strides_of(x: Any) -> tuple[int, ...]:
    """In bytes."""
    return tuple(s * x.element_size() for s in x.stride()) if hasattr(x, "untyped_storage") else tuple(x.strides)


def dtype_name(x: Any) -> str:
    return str(x.dtype).removeprefix("torch.")
