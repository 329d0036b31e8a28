"""How a graph holds FP8 weights: every mode yields their values in float32, to be multiplied by.

mode        initialisers                                              exact
fp8-qdq     the FP8 bytes and their scales; DequantizeLinear          yes
uint8-lut   the same bytes as uint8, and a table of their 256 values  yes
int8-qdq    int8, a scale per 1 x 128; DequantizeLinear               no, 1/254 of a block's largest value
fp16, bf16  dequantised and rounded                                   no, 11 and 8 bits

Scales of a 128 x 128 grid are stored as they are and repeated in the graph, since DequantizeLinear's blocks are one row
high. They also depend on the activations, though not on their values: onnxruntime would otherwise dequantise every
layer's weights before it runs the first, with all of them in memory at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from moekern.scaled import BLOCK, ScaledTensor

EXACT = ("fp8-qdq", "uint8-lut")
MODES = (*EXACT, "int8-qdq", "fp16", "bf16")
FLOAT, INT32, INT64, BOOL = 1, 6, 7, 9  # ONNX's numbers for types
Value = Any  # of a graph under construction


class Weight(NamedTuple):
    """[N, K] or a stack [E, N, K] of a program's tensors, in FP8, with the name it gets in the file."""

    name: str
    data: torch.Tensor
    scale: torch.Tensor
    block: Sequence[int]
    grids: int = 1  # 2: the halves of the rows have scale grids of their own, one above the other

    def expert(self, expert: int) -> Weight:
        return self._replace(name=f"{self.name}.{expert}", data=self.data[expert], scale=self.scale[expert])

    def exact(self) -> torch.Tensor:
        halves = zip(self.data.chunk(self.grids, -2), self.scale.chunk(self.grids, -2), strict=True)
        return torch.cat([ScaledTensor(w, s, (self.block[0], self.block[1])).to_float64() for w, s in halves], -2)


def constant(op: Any, x: torch.Tensor) -> Value:
    from onnx_ir.tensor_adapters import TorchTensor

    return op.Constant(value=TorchTensor(x.detach().contiguous()))


class Stored:
    """The weights of one graph."""

    def __init__(self, op: Any, mode: str) -> None:
        self.op, self.mode = op, mode
        self.weights: dict[str, Weight] = {}
        self._named: dict[str, Value] = {}

    def values(self, weight: Weight, after: Value) -> Value:
        """Float32 values of a weight [N, K]. `after`: activations that have to be there first."""
        self.weights[weight.name] = weight
        if self.mode in EXACT:
            return self._as_it_is(weight, after)
        exact = weight.exact().float()
        if self.mode == "int8-qdq":
            return self._int8(weight.name, exact, after)
        dtype = torch.float16 if self.mode == "fp16" else torch.bfloat16
        if (worst := exact.abs().max().item()) > torch.finfo(dtype).max:
            raise ValueError(
                f"{weight.name}: a weight of magnitude {worst:.3g} is beyond {self.mode}; bf16 has float32's range"
            )
        return self.op.Cast(self._initialiser(weight.name, exact.to(dtype)), to=FLOAT)

    def _initialiser(self, name: str, x: torch.Tensor) -> Value:
        """One for a name, however often a model uses it."""
        if name not in self._named:
            self._named[name] = constant(self.op, x)
            self._named[name].name = name
        return self._named[name]

    def _as_it_is(self, weight: Weight, after: Value) -> Value:
        op, k = self.op, weight.data.shape[1]
        scale = self._initialiser(f"{weight.name}_scale_inv", weight.scale.float())  # ue8m0 would need opset 24
        scale = _repeated(op, _late(op, scale, after), weight)
        width = min(weight.block[1], k)
        if self.mode == "fp8-qdq":
            return op.DequantizeLinear(self._initialiser(weight.name, weight.data), scale, axis=1, block_size=width)
        table = torch.arange(256, dtype=torch.uint8).view(weight.data.dtype).float()
        bytes_ = self._initialiser(weight.name, weight.data.view(torch.uint8))
        decoded = op.Gather(constant(op, table), op.Cast(bytes_, to=INT32))
        return op.Mul(decoded, op.Gather(scale, constant(op, torch.arange(k) // width), axis=1))

    def _int8(self, name: str, exact: torch.Tensor, after: Value) -> Value:
        k = exact.shape[1]
        padded = torch.nn.functional.pad(exact, (0, -k % BLOCK)).unflatten(-1, (-1, BLOCK))
        scale = padded.abs().amax(-1) / 127
        steps = padded / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
        data = self._initialiser(name, steps.round().to(torch.int8).flatten(-2)[:, :k])
        late = _late(self.op, self._initialiser(f"{name}_scale_inv", scale), after)
        return self.op.DequantizeLinear(data, late, axis=1, block_size=min(BLOCK, k))


def _repeated(op: Any, scale: Value, weight: Weight) -> Value:
    """A row of scales for every row of weights."""
    rows = weight.data.shape[0] // weight.grids
    blocks = -(-rows // weight.block[0])
    index = torch.cat([torch.arange(rows) // weight.block[0] + grid * blocks for grid in range(weight.grids)])
    return op.Gather(scale, constant(op, index), axis=0)


def _late(op: Any, x: Value, after: Value) -> Value:
    """x + 0, not known before `after` [T, K] is, whatever is in it and however few rows it has."""
    ends = [constant(op, torch.tensor([i, i])) for i in (0, 1)]
    first = op.ReduceSum(op.Slice(after, *ends, constant(op, torch.tensor([0, 1]))), keepdims=0)
    is_number = op.Cast(op.Equal(first, first), to=FLOAT)
    return op.Add(x, op.Mul(is_number, constant(op, torch.zeros(()))))
