"""Peers: what else a user could call for the same linear layer. Each is one class, or a reason why not.

A peer gets the weights dequantised to f32 (and the FP8 weights) before the clock starts; `call(turn)`
is one linear layer on the weights that belong to the turn. `copies` of the weights take turns.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any

import torch
from torch.nn import functional as F

from moekern import ScaledTensor
from peers import Named, without


class Peer(Named):
    weight_bytes: float  # per weight

    @abstractmethod
    def __init__(self, w: torch.Tensor, scaled: ScaledTensor, copies: int) -> None: ...

    @abstractmethod
    def bind(self, x: torch.Tensor) -> None:
        """Take the activations [m, k] f32, and whatever is allocated once."""

    @abstractmethod
    def call(self, turn: int) -> torch.Tensor: ...


class _TorchLinear(Peer):
    dtype: torch.dtype

    def __init__(self, w: torch.Tensor, scaled: ScaledTensor, copies: int) -> None:
        self.weights = [w.to(self.dtype, copy=True) for _ in range(copies)]

    def bind(self, x: torch.Tensor) -> None:
        self.x = x.to(self.dtype)
        self.out = torch.empty(x.shape[0], self.weights[0].shape[0], dtype=self.dtype)

    def call(self, turn: int) -> torch.Tensor:
        return torch.mm(self.x, self.weights[turn % len(self.weights)].t(), out=self.out)


class TorchBf16(_TorchLinear):
    name, says, weight_bytes, dtype = "torch-bf16", "linear, weights dequantised to bf16 beforehand", 2, torch.bfloat16


class TorchFp32(_TorchLinear):
    name, says, weight_bytes, dtype = "torch-fp32", "linear, weights dequantised to f32 beforehand", 4, torch.float32


class TorchInt8(Peer):
    name, says, weight_bytes = "torch-int8", "dynamic quantised linear: int8, one scale per tensor (other numbers)", 1

    @staticmethod
    def missing() -> str | None:
        engines = torch.backends.quantized.supported_engines
        return None if {"x86", "fbgemm", "onednn", "qnnpack"} & set(engines) else f"torch has no engine but {engines}"

    def __init__(self, w: torch.Tensor, scaled: ScaledTensor, copies: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao is deprecated, and has no successor in torch for this
            step = (w.abs().max() / 127).item()
            q = torch.quantize_per_tensor(w, step, 0, torch.qint8)
            self.packed = [torch.ops.quantized.linear_prepack(q, None) for _ in range(copies)]

    def bind(self, x: torch.Tensor) -> None:
        self.x = x

    def call(self, turn: int) -> torch.Tensor:
        return torch.ops.quantized.linear_dynamic(self.x, self.packed[turn % len(self.packed)], True)


class TorchDequantize(Peer):
    name, says, weight_bytes = "torch-dequantize", "FP8 weights to bf16 by torch operators, then linear, every call", 1

    def __init__(self, w: torch.Tensor, scaled: ScaledTensor, copies: int) -> None:
        self.data = [scaled.data.clone() for _ in range(copies)]
        self.scale, self.block = scaled.scale, scaled.block

    def bind(self, x: torch.Tensor) -> None:
        self.x = x.bfloat16()

    def call(self, turn: int) -> torch.Tensor:
        data = self.data[turn % len(self.data)]
        n, k = data.shape
        grid = self.scale.repeat_interleave(self.block[0], 0)[:n].repeat_interleave(self.block[1], 1)[:, :k]
        return F.linear(self.x, (data.to(torch.float32) * grid).bfloat16())


class _OnnxRuntime(Peer):
    @staticmethod
    def missing() -> str | None:
        return without("onnxruntime", "onnx")

    def graph(self, w: torch.Tensor) -> tuple[list[Any], list[Any]]:
        """Nodes from x to y, and initialisers."""
        raise NotImplementedError

    def __init__(self, w: torch.Tensor, scaled: ScaledTensor, copies: int) -> None:
        import onnx
        import onnxruntime

        nodes, constants = self.graph(w)
        value = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(
            nodes,
            self.name,
            [value("x", onnx.TensorProto.FLOAT, ["m", w.shape[1]])],
            [value("y", onnx.TensorProto.FLOAT, ["m", w.shape[0]])],
            constants,
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Its own threads would spin on after a call, at the cost of whoever is timed next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        serialised = model.SerializeToString()
        self.sessions = [
            onnxruntime.InferenceSession(serialised, options, providers=["CPUExecutionProvider"]) for _ in range(copies)
        ]

    def bind(self, x: torch.Tensor) -> None:
        self.x = {"x": x.numpy()}

    def call(self, turn: int) -> torch.Tensor:
        return torch.from_numpy(self.sessions[turn % len(self.sessions)].run(["y"], self.x)[0])


class OnnxRuntimeFp32(_OnnxRuntime):
    name, says, weight_bytes = "onnxruntime-fp32", "MatMul, weights dequantised to f32 beforehand", 4

    def graph(self, w: torch.Tensor) -> tuple[list[Any], list[Any]]:
        import onnx

        constants = [onnx.numpy_helper.from_array(w.t().contiguous().numpy(), "w")]
        return [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], constants


class OnnxRuntimeInt8(_OnnxRuntime):
    name, says, weight_bytes = "onnxruntime-int8", "DynamicQuantizeLinear and MatMulInteger (other numbers)", 1

    def graph(self, w: torch.Tensor) -> tuple[list[Any], list[Any]]:
        import onnx

        step = w.abs().max() / 127
        q = (w / step).round().to(torch.int8).t().contiguous().numpy()
        constants = [
            onnx.numpy_helper.from_array(q, "w"),
            onnx.numpy_helper.from_array(step.numpy(), "w_scale"),
        ]
        node = onnx.helper.make_node
        return [
            node("DynamicQuantizeLinear", ["x"], ["q", "x_scale", "x_zero"]),
            node("MatMulInteger", ["q", "w", "x_zero"], ["sums"]),
            node("Cast", ["sums"], ["sums_f32"], to=onnx.TensorProto.FLOAT),
            node("Mul", ["x_scale", "w_scale"], ["scale"]),
            node("Mul", ["sums_f32", "scale"], ["y"]),
        ], constants


PEERS: tuple[type[Peer], ...] = (
    TorchBf16,
    TorchFp32,
    TorchInt8,
    TorchDequantize,
    OnnxRuntimeInt8,
    OnnxRuntimeFp32,
)
