"""Problems: one op on one set of shapes, with the bytes and operations it cannot do without, and a check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import moekern
from moekern import Op, ScaledTensor, fp8_gemm_nt, per_token_cast_to_fp8
from moekern.testing.numerics import GemmOracle, check_bound, gemm_oracle
from timing.stock import Copies, Stock

SAMPLED_ROWS, SAMPLED_COLS = 16, 64


class WrongResult(AssertionError):
    """A kernel's result is not within the op's bound: there is no point in timing it."""


@dataclass
class Problem:
    op: Op
    shape: dict[str, int]  # m, n, k as the op has them
    activations: str  # "bf16", "fp8": what the left operand is
    flops: int
    bytes: int  # every operand read once and the result written once
    moves: str  # which rate limits the bytes: "read", or "copy" where as much is written as read
    example: dict[str, Any]  # arguments of one call, on the first copies
    arguments: Callable[[], dict[str, Any]]  # of a call, on the next copies
    check: Callable[[Any, dict[str, Any]], None]  # raises AssertionError
    error: Callable[[Any, dict[str, Any]], float] | None = None  # relative rms error of somebody's result, for peers

    def call(self, turn: int) -> Any:
        return self.op(**self.arguments())

    def prepared(self) -> tuple[Any, ...]:
        return self.op.prepare(**self.example)


def nbytes(*operands: torch.Tensor | ScaledTensor) -> int:
    tensors = [t for x in operands for t in (tuple(x) if isinstance(x, ScaledTensor) else (x,))]
    return sum(t.numel() * t.element_size() for t in tensors)


def _sample(count: int, most: int) -> torch.Tensor:
    """Indices spread over [0, count), the first and the last among them."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long()


def _some_rows(x: torch.Tensor | ScaledTensor, index: torch.Tensor) -> Any:
    """Rows of an operand, as an operand."""
    if isinstance(x, torch.Tensor):
        return x[index]
    data = x.data.view(torch.uint8)[index].view(x.data.dtype)
    return ScaledTensor(data, x.scale[index // x.block[0]], (1, x.block[1]))


def _sampled(out: torch.Tensor, call: dict[str, Any]) -> tuple[torch.Tensor, GemmOracle]:
    """Rows and columns of a D = A B^T, and what they should be."""
    i, j = _sample(out.shape[0], SAMPLED_ROWS), _sample(out.shape[1], SAMPLED_COLS)
    return out[i][:, j], gemm_oracle(fp8_gemm_nt, _some_rows(call["a"], i), _some_rows(call["b"], j))


def check_gemm(out: torch.Tensor, call: dict[str, Any]) -> None:
    if not out.isfinite().all():
        raise WrongResult(f"{int((~out.isfinite()).sum())} of {out.numel()} results are not finite")
    check_bound(*_sampled(out, call))


def sampled_error(out: torch.Tensor, call: dict[str, Any]) -> float:
    """Relative rms error of somebody's D = A B^T, on sampled rows and columns."""
    got, oracle = _sampled(out, call)
    return ((got.double() - oracle.reference).square().mean() / oracle.reference.square().mean()).sqrt().item()


def gemm(weights: Copies[ScaledTensor], m: int, activations: str) -> Problem:
    """D = A B^T: the weights come from DRAM, activations and output are where the layer before and after keep them."""
    first = weights.items[0]
    n, k = first.shape
    a: Any = torch.randn(m, k).bfloat16()
    if activations == "fp8":
        a = per_token_cast_to_fp8(a)
    out = torch.full((m, n), float("nan"), dtype=torch.bfloat16)
    return Problem(
        op=fp8_gemm_nt,
        shape={"m": m, "n": n, "k": k},
        activations=activations,
        flops=2 * m * n * k,
        bytes=nbytes(a, first, out),
        moves="read",
        example={"a": a, "b": first, "out": out},
        arguments=lambda: {"a": a, "b": weights.next(), "out": out},
        check=check_gemm,
        error=sampled_error,
    )


def plain_activations(problem: Problem) -> torch.Tensor:
    """A GEMM's activations as f32, for peers."""
    a = problem.example["a"]
    return a.float() if isinstance(a, torch.Tensor) else moekern.dequantize(a)


BLOCKS = {
    "per_token_cast_to_fp8": (1, 128),
    "silu_mul_cast_to_fp8": (1, 128),
    "per_block_cast_to_fp8": (128, 128),
    "per_channel_cast_to_fp8": (128, 1),
}
OPS = ("fp8_gemm_nt", *BLOCKS, "dequantize")  # whose problems are of one linear layer
OF_WEIGHTS = ("per_block_cast_to_fp8", "per_channel_cast_to_fp8", "dequantize")  # their rows are n, not m


def _ends(rows: int) -> list[slice]:
    """The first and the last 128 rows, aligned to the blocks of every cast."""
    last = (rows - 1) // 128 * 128
    return [slice(0, min(128, rows)), slice(last, rows)]


def _check_cast(op: Op) -> Callable[[Any, dict[str, Any]], None]:
    slack = 1 if op.name == "silu_mul_cast_to_fp8" else 0  # its silu may end on the neighbouring code

    def check(out: ScaledTensor, call: dict[str, Any]) -> None:
        for part in _ends(out.shape[0]):
            expected = op.reference(call["x"][part])
            distance = out.data[part].view(torch.uint8).int() - expected.data.view(torch.uint8).int()
            first = part.start // out.block[0]
            scale = out.scale[first : first + expected.scale.shape[0]]
            if (distance.abs() > slack).any():
                raise WrongResult(f"{int((distance.abs() > slack).sum())} codes differ in rows {part.start} and on")
            if not torch.allclose(scale, expected.scale, rtol=slack * 1e-6, atol=0):
                raise WrongResult(f"scales differ in rows {part.start} and on")

    return check


def cast(op: Op, stock: Stock, rows: int, cols: int) -> Problem:
    """bf16 to FP8, both in DRAM."""
    x = stock.activations(rows, 2 * cols if op.name == "silu_mul_cast_to_fp8" else cols)
    block = BLOCKS[op.name]
    grid = (-(-rows // block[0]), -(-cols // block[1]))
    data = stock.outputs(rows, cols, torch.float8_e4m3fn)
    out = Copies(data.pool, data.step, [ScaledTensor(item, torch.zeros(grid), block) for item in data.items])
    return Problem(
        op=op,
        shape={"m": rows, "n": cols},
        activations="bf16",
        flops=0,
        bytes=nbytes(x.items[0], out.items[0]),
        moves="copy",
        example={"x": x.items[0], "out": out.items[0]},
        arguments=lambda: {"x": x.next(), "out": out.next()},
        check=_check_cast(op),
    )


def dequantize(stock: Stock, rows: int, cols: int) -> Problem:
    """FP8 to bf16, both in DRAM."""
    x, out = stock.weights(rows, cols), stock.outputs(rows, cols, torch.bfloat16)

    def check(out: torch.Tensor, call: dict[str, Any]) -> None:
        for part in _ends(rows):
            exact = _some_rows(call["x"], torch.arange(part.start, part.stop)).to_float64()
            if not torch.equal(out[part], exact.float().bfloat16()):
                raise WrongResult(f"values differ in rows {part.start} and on")

    return Problem(
        op=moekern.dequantize,
        shape={"m": rows, "n": cols},
        activations="fp8",
        flops=0,
        bytes=nbytes(x.items[0], out.items[0]),
        moves="copy",
        example={"x": x.items[0], "out": out.items[0]},
        arguments=lambda: {"x": x.next(), "out": out.next()},
        check=check,
    )
