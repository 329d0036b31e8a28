"""How a file holds FP8 weights, and what a product with them is.

mode         initialisers                                              values
fp8-qdq      the FP8 bytes and their scales; DequantizeLinear          exact
uint8-lut    the same bytes as uint8, and a table of their 256 values  exact
int8-qdq     int8, a scale per 1 x 128; DequantizeLinear               1/254 of a block's largest value
fp16         dequantised, [K, N]; products are float16                 11 bits
bf16         dequantised and rounded                                   8 bits
ort-contrib  uint8 around 128, a scale per 1 x 128; MatMulNBits        as int8-qdq

Products are float32 but for fp16's. Scales of a 128 x 128 grid are stored as they are and repeated in the graph, since
DequantizeLinear's blocks are one row high. What decodes weights also depends on the activations, though not on their
values: onnxruntime would otherwise decode every layer's before it runs the first, with all of them in memory at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from moekern.onnx.graph import BF16, FLOAT, FLOAT16, FP8, INT8, INT32, INT64, UINT8, Graph, Value
from moekern.scaled import BLOCK, ScaledTensor

EXACT = ("fp8-qdq", "uint8-lut")
MODES = (*EXACT, "int8-qdq", "fp16", "bf16", "ort-contrib")
_ROWS = 1024  # a multiple of the blocks that there are


class Weight(NamedTuple):
    """A matrix [N, K], or a stack of them [E, N, K]."""

    name: str  # in the file
    names: tuple[str, ...]  # of each matrix, as load_weights gives them
    matrices: tuple[ScaledTensor, ...]
    stacked: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        n, k = self.matrices[0].shape
        return (len(self.matrices), n, k) if self.stacked else (n, k)


def one(name: str, matrix: ScaledTensor) -> Weight:
    return Weight(name, (name,), (matrix,))


def stack(weights: list[Weight]) -> Weight:
    matrices = tuple(weight.matrices[0] for weight in weights)
    return Weight(
        f"{weights[0].name}+{len(weights) - 1}", tuple(weight.name for weight in weights), matrices, stacked=True
    )


class Stored:
    """The weights of one graph."""

    def __init__(self, graph: Graph, mode: str) -> None:
        self.graph, self.mode = graph, mode
        self.type = FLOAT16 if mode == "fp16" else FLOAT  # of products
        self.weights: dict[str, Weight] = {}
        self._zeros: dict[Value, Value] = {}

    def times(self, rows: Value, weight: Weight, index: Value | None = None) -> Value:
        """rows @ W^T for W [N, K], the index-th of a stack, or each of a stack for rows [E, T, K]."""
        op = self.graph.op
        self.weights[weight.name] = weight
        if self.mode == "fp16":
            matrices = self._part(self._initialiser(weight, FLOAT16, half, transposed=True), index)
            return op.MatMul(rows, matrices)
        if self.mode == "ort-contrib":
            return self._nbits(rows, weight)
        return op.Gemm(rows, self._values(weight, rows, index), transB=1)  # no transposed copy of the values

    def _values(self, weight: Weight, after: Value, index: Value | None) -> Value:
        if self.mode in EXACT:
            return self._as_it_is(weight, after, index)
        if self.mode == "int8-qdq":
            return self._int8(weight, after, index)
        return self.graph.op.Cast(
            self._late_part(self._initialiser(weight, BF16, _bf16), weight, after, index), to=FLOAT
        )

    def _part(self, stack: Value, index: Value | None) -> Value:
        return stack if index is None else self.graph.op.Gather(stack, index, axis=0)

    def _initialiser(
        self,
        weight: Weight,
        dtype: int,
        make: Callable[[str, ScaledTensor], torch.Tensor],
        suffix: str = "",
        shape: tuple[int, ...] | None = None,
        transposed: bool = False,
    ) -> Value:
        """Made of each matrix when the file is written, [*stack, *shape]."""
        *ahead, n, k = weight.shape
        own = ((k, n) if transposed else (n, k)) if shape is None else shape

        def whole() -> torch.Tensor:
            parts = [make(name, m) for name, m in zip(weight.names, weight.matrices, strict=True)]
            parts = [part.mT for part in parts] if transposed else parts
            return torch.stack(parts) if weight.stacked else parts[0]

        return self.graph.initialiser(f"{weight.name}{suffix}", (*ahead, *own), dtype, whole)

    def _as_it_is(self, weight: Weight, after: Value, index: Value | None) -> Value:
        graph, first = self.graph, weight.matrices[0]
        op, (n, k), (rows, columns) = graph.op, first.shape, first.block
        grid = tuple(first.scale.shape)
        scale = self._initialiser(weight, FLOAT, lambda _, m: m.scale.float(), "_scale_inv", grid)  # no ue8m0 below 24
        scale = op.Gather(self._late(self._part(scale, index), after), graph.constant(torch.arange(n) // rows), axis=0)
        if self.mode == "fp8-qdq":
            data = self._initialiser(weight, FP8[first.format], lambda _, m: m.data)
            return self._dequantized(data, scale, columns, k, after)
        table = torch.arange(256, dtype=torch.uint8).view(first.data.dtype).float()
        data = self._initialiser(weight, UINT8, lambda _, m: m.data.view(torch.uint8))
        data = self._late_part(data, weight, after, index)
        decoded = op.Gather(graph.constant(table), op.Cast(data, to=INT32))
        return op.Mul(decoded, op.Gather(scale, graph.constant(torch.arange(k) // columns), axis=1))

    def _dequantized(self, data: Value, scale: Value, columns: int, k: int, after: Value) -> Value:
        """[N, k] of scales [N, blocks]. Some runtimes take no last block that is shorter: scales go without blocks."""
        op, block = self.graph.op, min(columns, k)
        if k % block == 0:
            return op.DequantizeLinear(data, scale, axis=1, block_size=block)
        spread = op.Gather(scale, self.graph.constant(torch.arange(k) // columns), axis=1)
        return op.Mul(op.DequantizeLinear(data, self._late(self.graph.number(1.0), after)), spread)

    def _int8(self, weight: Weight, after: Value, index: Value | None) -> Value:
        n, k = weight.matrices[0].shape
        data = self._part(self._initialiser(weight, INT8, lambda _, m: in_steps(m)[0]), index)
        scale = self._initialiser(weight, FLOAT, lambda _, m: in_steps(m)[1], "_scale_inv", (n, -(-k // BLOCK)))
        late = self._late(self._part(scale, index), after)
        return self._dequantized(data, late, BLOCK, k, after)

    def _nbits(self, rows: Value, weight: Weight) -> Value:
        n, k = weight.shape
        blocks = -(-k // BLOCK)
        data = self._initialiser(weight, UINT8, lambda _, m: around_128(m), shape=(n, blocks, BLOCK))
        scale = self._initialiser(weight, FLOAT, lambda _, m: in_steps(m)[1], "_scale_inv", (n, blocks))
        options = {"K": k, "N": n, "bits": 8, "block_size": BLOCK}
        return self.graph.node("com.microsoft", "MatMulNBits", [rows, data, scale], **options)

    def _late_part(self, stack: Value, weight: Weight, after: Value, index: Value | None) -> Value:
        """A part of a stack, or all rows of a matrix, not known before `after` is."""
        if index is not None:
            return self._part(stack, index)
        numbers = self.graph.constant(torch.arange(weight.shape[0]))
        late = self.graph.op.Add(numbers, self.graph.op.Cast(self._zero(after), to=INT64))
        return self.graph.op.Gather(stack, late, axis=0)

    def _late(self, x: Value, after: Value) -> Value:
        """x, not known before `after` is."""
        return self.graph.op.Add(x, self._zero(after))

    def _zero(self, after: Value) -> Value:
        """0, of activations [T, K], whatever is in them and however few rows they have."""
        if after not in self._zeros:
            graph, op = self.graph, self.graph.op
            first = op.ReduceSum(op.Slice(after, graph.ints(0, 0), graph.ints(1, 1), graph.ints(0, 1)), keepdims=0)
            is_number = op.Cast(op.Equal(first, first), to=FLOAT)
            self._zeros[after] = op.Mul(is_number, graph.number(0.0))
        return self._zeros[after]


def _pieces(x: ScaledTensor) -> Iterator[torch.Tensor]:
    """Its values in float32, some rows at a time: intermediate results are of these alone."""
    rows, columns = x.block
    step = _ROWS if _ROWS % rows == 0 else x.shape[0]
    for first in range(0, x.shape[0], step):
        data = x.data[first : first + step].float()  # a product with a float32 is rounded once, as from float64
        scale = x.scale[first // rows : -(-(first + step) // rows)].float()
        spread = scale.repeat_interleave(rows, 0)[: len(data)].repeat_interleave(columns, 1)[:, : data.shape[1]]
        yield data * spread


def half(name: str, x: ScaledTensor) -> torch.Tensor:
    most = torch.finfo(torch.float16).max

    def rounded(exact: torch.Tensor) -> torch.Tensor:
        if (worst := exact.abs().max().item()) > most:
            raise ValueError(
                f"{name}: a weight of magnitude {worst:.3g} is beyond fp16's {most:.5g}; bf16 has its range"
            )
        return exact.half()

    return torch.cat([rounded(exact) for exact in _pieces(x)])


def _bf16(name: str, x: ScaledTensor) -> torch.Tensor:
    return torch.cat([exact.bfloat16() for exact in _pieces(x)])


def in_steps(x: ScaledTensor, block: int = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [N, K] and its scales for each 1 x block."""
    k = x.shape[1]

    def stepped(exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        padded = torch.nn.functional.pad(exact, (0, -k % block)).unflatten(-1, (-1, block))
        scale = padded.abs().amax(-1) / 127
        steps = padded / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
        return steps.round_().to(torch.int8).flatten(-2)[:, :k], scale

    data, scales = zip(*map(stepped, _pieces(x)), strict=True)
    return torch.cat(data), torch.cat(scales)


def around_128(x: ScaledTensor, block: int = BLOCK) -> torch.Tensor:
    """The same steps as uint8 [N, blocks, block], the last block filled with zeros, which are 128."""
    steps = torch.nn.functional.pad(in_steps(x, block)[0], (0, -x.shape[1] % block))
    return (steps.view(torch.uint8) ^ 128).unflatten(1, (-1, block))  # of two's complement
