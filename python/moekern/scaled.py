"""ScaledTensor: the one description of an FP8 operand. Nothing below it guesses a format or a grid."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

BLOCK = 128

FORMATS: dict[torch.dtype, str] = {
    torch.float8_e4m3fn: "e4m3fn",
    torch.float8_e4m3fnuz: "e4m3fnuz",
    torch.float8_e5m2: "e5m2",
}
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in FORMATS.items()}
MAX: dict[str, float] = {"e4m3fn": 448.0, "e4m3fnuz": 240.0, "e5m2": 57344.0}

_ML_DTYPES = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e4m3fnuz": torch.float8_e4m3fnuz,
    "float8_e5m2": torch.float8_e5m2,
    "float8_e8m0fnu": torch.float8_e8m0fnu,
    "bfloat16": torch.bfloat16,
}


def as_tensor(x: Any, what: str = "operand") -> torch.Tensor:
    """A torch view of any array that speaks DLPack (numpy, CuPy, JAX), ml_dtypes' formats included.

    Raises TypeError, beginning with `what`.
    """
    if isinstance(x, torch.Tensor):
        return x
    name = str(getattr(x, "dtype", ""))
    if name in _ML_DTYPES and hasattr(x, "view"):  # numpy exports these formats only as integers
        dtype = _ML_DTYPES[name]
        return from_dlpack(x.view("int16" if dtype.itemsize == 2 else "uint8")).view(dtype)
    if not hasattr(x, "__dlpack__"):
        raise TypeError(f"{what} is a {type(x).__name__}; it must be a tensor or an array that speaks DLPack")
    try:
        return from_dlpack(x)
    except (BufferError, RuntimeError) as error:
        raise TypeError(f"{what} is a {type(x).__name__} of {name} that DLPack cannot pass on: {error}") from error


def as_scaled(x: Any, what: str = "operand") -> ScaledTensor:
    """A ScaledTensor, or the one that a (data, scale) pair stands for. Errors begin with `what`."""
    if type(x) is ScaledTensor:
        return x
    if not isinstance(x, (tuple, list)) or len(x) != 2:
        raise TypeError(f"{what} is a {type(x).__name__}; it must be a ScaledTensor or a (data, scale) pair")
    try:
        return ScaledTensor(*x)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{what}.{error}") from None


def as_operand(x: Any, what: str = "operand") -> ScaledTensor | torch.Tensor:
    """A ScaledTensor for a pair, a tensor for an array: either operand of a product. Errors begin with `what`."""
    return as_scaled(x, what) if isinstance(x, (ScaledTensor, tuple, list)) else as_tensor(x, what)


def infer_block(shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, int]:
    """The block of a scale grid, from its shape.

    Grids of DeepSeek's three block sizes (1x128, 128x128, 128x1), one scale per row, and one per
    tensor. Where two of them give the same grid shape they also mean the same.
    """
    rows, cols = shape
    for block in ((1, BLOCK), (BLOCK, BLOCK), (BLOCK, 1), (1, cols), (rows, cols)):
        if scale == (-(-rows // max(block[0], 1)), -(-cols // max(block[1], 1))):
            return (max(block[0], 1), max(block[1], 1))
    raise ValueError(
        f"scale has shape {list(scale)}, which fits no known block of data {list(shape)}: 1x128 takes "
        f"{[rows, -(-cols // BLOCK)]}, 128x128 {[-(-rows // BLOCK), -(-cols // BLOCK)]}, per row {[rows, 1]}, "
        "per tensor [1, 1]; name any other with ScaledTensor(data, scale, block=(rows, columns))"
    )


def parts(x: Any) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    """(data, scale [rows, columns], block) of a ScaledTensor or a (data, scale) pair."""
    if isinstance(x, ScaledTensor):
        return x.data, x.scale, x.block
    return parts(as_scaled(x))


def _normalised(
    data: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    if data.dtype not in FORMATS:
        raise TypeError(f"data has dtype {data.dtype}; it is one of {', '.join(map(str, FORMATS))}")
    if scale.dtype not in (torch.float32, torch.float8_e8m0fnu):
        raise TypeError(f"scale has dtype {scale.dtype}; it is torch.float32 or torch.float8_e8m0fnu")
    if data.dim() not in (2, 3):
        raise ValueError(f"data has shape {list(data.shape)}; it must have 2 dimensions, or 3 for a stack of matrices")
    if data.dim() == 2 and scale.dim() < 2:  # a scalar, or one scale per row
        scale = scale.reshape(-1, 1)
    if scale.dim() != data.dim() or scale.shape[:-2] != data.shape[:-2]:
        raise ValueError(
            f"scale has shape {list(scale.shape)}; data {list(data.shape)} takes as many dimensions and matrices"
        )
    shape, grid = tuple(data.shape[-2:]), tuple(scale.shape[-2:])
    return data, scale, infer_block(shape, grid) if block is None else _checked_block(block, shape, grid)


def _checked_block(block: Any, shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, int]:
    if not (
        isinstance(block, (tuple, list))
        and len(block) == 2
        and all(isinstance(extent, (int, torch.SymInt)) and extent > 0 for extent in block)
    ):
        raise ValueError(f"block is {block!r}; it is (rows, columns), two positive integers")
    rows, cols = block
    if scale != (-(-shape[0] // rows), -(-shape[1] // cols)):
        raise ValueError(
            f"scale has shape {list(scale)}; data {list(shape)} in blocks of {rows} x {cols} takes "
            f"{[-(-shape[0] // rows), -(-shape[1] // cols)]}"
        )
    return rows, cols


@dataclass(frozen=True, eq=False)
class ScaledTensor:
    """FP8 data and its decode multipliers: x[i, j] ~ data[i, j] * scale[i // block[0], j // block[1]].

    data: [rows, columns] torch.float8_e4m3fn, float8_e4m3fnuz or float8_e5m2; [G, rows, columns] for a
        stack of G matrices, such as the weights of G experts.
    scale: [ceil(rows / block[0]), ceil(columns / block[1])] float32 or float8_e8m0fnu, [G, ...] for a
        stack. Edge blocks may be partial. Without a stack, a scalar is one scale for the tensor, a
        vector one per row.
    block: (rows, columns) of one scale; inferred from the shapes when it is one of 1x128, 128x128,
        128x1, per row, per tensor.

    Checkpoints call the multiplier `weight_scale_inv`; it is used as it is. The value unpacks like
    the pair it stands for: `q, s = x`.
    """

    data: torch.Tensor
    scale: torch.Tensor
    block: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        block = self.block if self.block != (0, 0) else None
        data, scale, block = _normalised(as_tensor(self.data, "data"), as_tensor(self.scale, "scale"), block)
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "block", block)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter((self.data, self.scale))

    @property
    def format(self) -> str:
        return FORMATS[self.data.dtype]

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def T(self) -> ScaledTensor:
        """The transpose, of every matrix of a stack: a view."""
        return ScaledTensor(self.data.mT, self.scale.mT, (self.block[1], self.block[0]))

    def group(self, g: int) -> ScaledTensor:
        """Matrix g of a stack, a view."""
        if self.data.dim() != 3:
            raise ValueError(f"data has shape {list(self.data.shape)}; a stack of matrices has 3 dimensions")
        return ScaledTensor(self.data[g], self.scale[g], self.block)

    def to_e4m3fnuz(self) -> ScaledTensor:
        """The same values in the format that gfx942 multiplies, where e4m3fn would be converted at every call.

        A byte of e4m3fnuz is worth half of what it is in e4m3fn, so bytes stay and scales double, except for NaN and
        -0: e4m3fnuz has one NaN, where e4m3fn has -0, and no -0. Raises ValueError for scales that cannot be doubled.
        """
        if self.format != "e4m3fn":
            raise ValueError(f"data has dtype {self.data.dtype}; only torch.float8_e4m3fn becomes e4m3fnuz exactly")
        scale = 2 * self.scale.to(torch.float32)
        if (scale.isinf() & ~self.scale.to(torch.float32).isinf()).any():
            raise ValueError("scale has values of 2^127 or more, which float32 has no double of")
        of_bytes = self.data.view(torch.uint8)
        exchanged = of_bytes.masked_fill(of_bytes == 0x80, 0x00).masked_fill_(of_bytes & 0x7F == 0x7F, 0x80)
        return ScaledTensor(exchanged.view(torch.float8_e4m3fnuz), scale.to(self.scale.dtype), self.block)

    def to_float64(self) -> torch.Tensor:
        """The exact values, for references."""
        scale = self.scale.to(torch.float32).to(torch.float64)
        rows, cols = self.data.shape[-2:]
        grid = scale.repeat_interleave(self.block[0], -2)[..., :rows, :].repeat_interleave(self.block[1], -1)[
            ..., :cols
        ]
        return self.data.to(torch.float32).to(torch.float64) * grid
