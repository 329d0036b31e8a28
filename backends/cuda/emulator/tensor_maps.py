"""Tensor maps, by which bulk copies find their way in a tensor."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from moekern.backends.cuda.emulator import arrays, driver

# CUtensorMapDataType. FP8 goes as bytes, as on the device.
_TYPES = {
    "uint8": 0, "int8": 0, "bool": 0, "float8_e4m3fn": 0, "float8_e5m2": 0, "float8_e4m3fnuz": 0,
    "uint16": 1, "int16": 1, "uint32": 2, "int32": 3, "uint64": 4, "int64": 5,
    "float16": 6, "float32": 7, "float64": 8, "bfloat16": 9,
}  # fmt: skip
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}


class TensorMap:
    """A map of `array`, as cuTensorMapEncodeTiled makes it, for boxes of `box` elements.

    box: sizes in the order of the array's dimensions, the contiguous one last. swizzle: 0, 32, 64 or 128 bytes.
    fill: "zeros" or "nan", what a box gets where it lies outside of the array.
    """

    def __init__(self, array: Any, box: Sequence[int], *, swizzle: int = 0, fill: str = "zeros") -> None:
        name, shape, strides = arrays.dtype_name(array), tuple(array.shape), arrays.strides_of(array)
        if name not in _TYPES:
            raise ValueError(f"array has dtype {name}, a tensor map takes {', '.join(_TYPES)}")
        if len(box) != len(shape):
            raise ValueError(f"box has {len(box)} dimensions, the array has {len(shape)}")
        if swizzle not in _SWIZZLES:
            raise ValueError(f"swizzle is {swizzle}, allowed are 0, 32, 64 and 128 bytes")
        if fill not in ("zeros", "nan"):
            raise ValueError(f"fill is {fill!r}, allowed are 'zeros' and 'nan'")
        self.array = array
        self.memory = arrays.memory_of(array)
        itemsize = array.element_size() if hasattr(array, "element_size") else array.itemsize
        if shape and shape[-1] > 1 and strides[-1] != itemsize:
            raise ValueError("array: the last dimension of what a tensor map describes has to be contiguous")
        rank = len(shape)
        room = (ctypes.c_uint8 * 192)()
        at = -(-ctypes.addressof(room) // 64) * 64
        result = driver.library().cuTensorMapEncodeTiled(
            ctypes.c_void_p(at), _TYPES[name], rank, ctypes.c_void_p(self.memory[0]),
            (ctypes.c_uint64 * 8)(*reversed(shape)), (ctypes.c_uint64 * 8)(*reversed(strides[:-1])),
            (ctypes.c_uint32 * 8)(*reversed(box)), (ctypes.c_uint32 * 8)(*[1] * rank),
            0, _SWIZZLES[swizzle], 0, int(fill == "nan"),
        )  # fmt: skip
        if result:
            raise ValueError(driver.library().moekern_emulator_fault().decode())
        self.words = ctypes.string_at(at, 128)
