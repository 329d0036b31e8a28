"""A graph under construction: the operators of an opset, and what their callers say often."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

FLOAT, UINT8, INT8, INT32, INT64, BOOL, FLOAT16, BF16 = 1, 2, 3, 6, 7, 9, 10, 16  # ONNX's numbers for types
FP8 = {"e4m3fn": 17, "e4m3fnuz": 18, "e5m2": 19}
DTYPES = {FLOAT: torch.float32, FLOAT16: torch.float16, BF16: torch.bfloat16}  # of floats
OLDEST_WRITTEN = 18  # what torch.onnx and onnxscript write at least; lower.py goes on from there
BLOCKS_SINCE = 21  # DequantizeLinear's block_size
Value = Any  # of a graph under construction


class Graph:
    """op: onnxscript's operators. A call of one adds a node to what torch.onnx.export is translating."""

    def __init__(self, opset: int) -> None:
        import onnxscript

        self.opset = opset
        self.op = getattr(onnxscript, f"opset{max(opset, OLDEST_WRITTEN)}")
        self.initialisers: dict[str, Value] = {}
        self._graphs = 0

    def constant(self, x: torch.Tensor) -> Value:
        from onnx_ir.tensor_adapters import TorchTensor

        return self.op.Constant(value=TorchTensor(x.detach().contiguous()))

    def ints(self, *x: int) -> Value:
        return self.constant(torch.tensor(x, dtype=torch.int64))

    def number(self, x: float, to: int = FLOAT) -> Value:
        return self.constant(torch.tensor(x, dtype=DTYPES[to]))

    def numbers(self, x: torch.Tensor, like: Value) -> Value:
        """Integers of a value's type, which is not cast: some runtimes have few casts."""
        return self.constant(x.to(torch.int32 if int(like.dtype) == INT32 else torch.int64))

    def counted(self, x: Value) -> Value:
        """0, 1, ... of the rows of a tensor, int64."""
        rows = self.op.Squeeze(self.op.Shape(x, start=0, end=1))
        return self.op.Range(self.constant(torch.tensor(0)), rows, self.constant(torch.tensor(1)))

    def rows_of(self, mask: Value) -> Value:
        """mask [T, 1] bool -> the rows where it is true [n, 1], as GatherND and ScatterND take them."""
        return self.op.Transpose(self.op.NonZero(self.op.Squeeze(mask, self.ints(1))), perm=[1, 0])

    def cast(self, x: Value, to: int) -> Value:
        return x if x.dtype is not None and int(x.dtype) == to else self.typed(self.op.Cast(x, to=to), to)

    def typed(self, x: Value, to: int) -> Value:
        """x, of which is known that it has this type."""
        import onnx_ir as ir

        x.dtype = ir.DataType(to)
        return x

    def initialiser(self, name: str, shape: tuple[int, ...], dtype: int, make: Callable[[], torch.Tensor]) -> Value:
        """One for a name, however often a model uses it. `make` is called when the file is written."""
        import onnx_ir as ir
        from onnx_ir.tensor_adapters import TorchTensor

        if name not in self.initialisers:
            shown, kind = ir.Shape(shape), ir.DataType(dtype)
            tensor = ir.LazyTensor(
                lambda: TorchTensor(make().detach().contiguous(), name=name), dtype=kind, shape=shown, name=name
            )
            self.initialisers[name] = ir.Value(name=name, shape=shown, type=ir.TensorType(kind), const_value=tensor)
        return self.initialisers[name]

    def node(self, domain: str, name: str, inputs: list[Value | None], **attributes: Any) -> Value:
        """The output of an operator that `op` does not have."""
        import onnx_ir as ir

        node = ir.Node(domain, name, inputs, ir.convenience.convert_attributes(attributes), num_outputs=1)
        self._nodes().append(node)
        return node.outputs[0]

    def loop(self, count: int, start: Value, step: Callable[[Value, Value], Value]) -> Value:
        """step(i, value) for i < count, from value = start [*, *]; i is an int64 scalar."""
        import onnx_ir as ir

        name = self._name("loop")
        i = ir.Value(name=f"{name}.i", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(()))
        going = ir.Value(name=f"{name}.going", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape(()))
        value = ir.Value(name=f"{name}.value", type=ir.TensorType(start.dtype), shape=ir.Shape((None, None)))
        body = self._inside(name, [i, going, value], lambda: [self.op.Identity(going), step(i, value)])
        for output, like in zip(body.outputs, (going, value), strict=True):
            output.dtype, output.shape = like.dtype, like.shape
        inputs = [self.constant(torch.tensor(count)), self.constant(torch.tensor(True)), start]
        return self.typed(self.node("", "Loop", inputs, body=body), int(start.dtype))

    def either(self, condition: Value, then: Callable[[], Value], otherwise: Callable[[], Value], to: int) -> Value:
        """then() [*, *] where a scalar is true, else otherwise(), of one type; only what is taken is computed."""
        import onnx_ir as ir

        branches = {}
        for key, result in (("then", then), ("else", otherwise)):
            body = self._inside(self._name(key), [], functools.partial(_alone, result))
            body.outputs[0].dtype, body.outputs[0].shape = ir.DataType(to), ir.Shape((None, None))
            branches[f"{key}_branch"] = body
        return self.typed(self.node("", "If", [condition], **branches), to)

    def _inside(self, name: str, inputs: list[Value], results: Callable[[], list[Value]]) -> Any:
        """A graph of the nodes that `results` adds, which gives what it returns."""
        import onnx_ir as ir

        nodes = self._nodes()
        outside = len(nodes)
        outputs = results()
        inside = nodes[outside:]
        del nodes[outside:]
        for number, node in enumerate(inside):
            for output in node.outputs:  # a graph would name them as the one around it does
                output.name = f"{name}.{number}.{output.index()}"
        return ir.Graph(inputs, outputs, nodes=inside, name=name)

    def _name(self, kind: str) -> str:
        self._graphs += 1
        return f"{kind}{self._graphs}"

    def _nodes(self) -> list[Any]:
        """Those of the translation that is under way."""
        from onnxscript import evaluator

        return evaluator.default().nodes  # type: ignore[attr-defined]


def _alone(result: Callable[[], Value]) -> list[Value]:
    return [result()]
