"""Peers of fused_experts: what else a user could call for the same layer. Each is one class, or a reason why not.

A peer gets the FP8 experts before the clock starts and dequantises them; `call` is the layer on one routing.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch.nn import functional as F

from moekern import ExpertWeights, dequantize
from peers import Named, without

Routing = tuple[torch.Tensor, torch.Tensor]  # ids, weights


class Dense:
    """The experts dequantised: w13 [E, 2 I, H], gate over up, and w2 [E, H, I]."""

    def __init__(self, experts: ExpertWeights, dtype: torch.dtype) -> None:
        size, hidden = experts.intermediate_size, experts.hidden_size
        self.w13 = torch.empty(experts.num_experts, 2 * size, hidden, dtype=dtype)
        self.w2 = torch.empty(experts.num_experts, hidden, size, dtype=dtype)
        for e, ((gate, _), (up, _), (down, _)) in enumerate(experts.projections()):
            if up is gate:  # halves of one matrix
                dequantize(gate, out=self.w13[e])
            else:
                dequantize(gate, out=self.w13[e, :size])
                dequantize(up, out=self.w13[e, size:])
            dequantize(down, out=self.w2[e])

    def feed_forward(self, x: torch.Tensor, e: int) -> torch.Tensor:
        gate, up = F.linear(x, self.w13[e]).chunk(2, dim=1)
        return F.linear(F.silu(gate) * up, self.w2[e])


class MoePeer(Named):
    weight_bytes: float  # per weight

    @abstractmethod
    def __init__(self, experts: ExpertWeights, shared: ExpertWeights | None) -> None: ...

    @abstractmethod
    def bind(self, x: torch.Tensor) -> None:
        """Take the activations [T, H] bf16."""

    @abstractmethod
    def call(self, routing: Routing) -> torch.Tensor: ...


class _Torch(MoePeer):
    dtype: torch.dtype

    def __init__(self, experts: ExpertWeights, shared: ExpertWeights | None) -> None:
        self.dense = Dense(experts, self.dtype)
        self.shared = None if shared is None else Dense(shared, self.dtype)

    def bind(self, x: torch.Tensor) -> None:
        self.x = x.to(self.dtype)

    def call(self, routing: Routing) -> torch.Tensor:
        out = self.routed(*routing)
        if self.shared is not None:
            for e in range(len(self.shared.w2)):
                out += self.shared.feed_forward(self.x, e)
        return out

    def routed(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class _Loop(_Torch):
    """As `eager` experts of transformers."""

    def routed(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(self.x)
        for e in ids.unique().tolist():
            token, slot = (ids == e).nonzero(as_tuple=True)
            y = self.dense.feed_forward(self.x[token], e) * weights[token, slot, None].to(self.dtype)
            out.index_add_(0, token, y)
        return out


class LoopBf16(_Loop):
    name, says, weight_bytes, dtype = "torch-loop-bf16", "a loop over the experts in bf16", 2, torch.bfloat16


class LoopFp32(_Loop):
    name, says, weight_bytes, dtype = "torch-loop-fp32", "a loop over the experts in f32", 4, torch.float32


class GroupedBf16(_Torch):
    """As `grouped_mm` experts of transformers."""

    name, says, weight_bytes, dtype = "torch-grouped-bf16", "F.grouped_mm on tokens sorted by expert", 2, torch.bfloat16

    @staticmethod
    def missing() -> str | None:
        return None if hasattr(F, "grouped_mm") else f"torch {torch.__version__} has no grouped_mm"

    def routed(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        order = ids.flatten().argsort(stable=True)
        ends = torch.bincount(ids.flatten(), minlength=len(self.dense.w2)).cumsum(0).to(torch.int32)
        token = order // ids.shape[1]
        gate, up = F.grouped_mm(self.x[token], self.dense.w13.mT, offs=ends).chunk(2, dim=1)
        y = F.grouped_mm(F.silu(gate) * up, self.dense.w2.mT, offs=ends)
        y = y * weights.flatten()[order, None].to(self.dtype)
        return torch.zeros_like(self.x).index_add_(0, token, y)


class OnnxRuntimeMoe(MoePeer):
    """com.microsoft.MoE chooses experts itself: from logits of log(weight) for the given ones, and -1e30 for others."""

    name, says, weight_bytes = "onnxruntime-moe", "com.microsoft.MoE in f32, the routing as logits", 4

    @staticmethod
    def missing() -> str | None:
        return without("onnxruntime", "onnx")

    def __init__(self, experts: ExpertWeights, shared: ExpertWeights | None) -> None:
        if shared is not None:
            raise RuntimeError("its CPU kernel has no shared experts")
        dense = Dense(experts, torch.float32)
        interleaved = torch.stack(dense.w13.chunk(2, dim=1), dim=2).flatten(1, 2)
        self.weights = {"w13": interleaved.numpy(), "w2": dense.w2.numpy()}
        self.experts = experts.num_experts

    def bind(self, x: torch.Tensor) -> None:
        self.x = x.float()
        self.session: Any = None

    def _open(self, top_k: int) -> None:
        import onnx
        import onnxruntime

        value, number = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
        node = onnx.helper.make_node(
            "MoE",
            ["x", "logits", "w13", "", "w2"],
            ["y"],
            domain="com.microsoft",
            k=top_k,
            activation_type="swiglu",
            swiglu_fusion=1,
            activation_alpha=1.0,
            activation_beta=0.0,
            swiglu_limit=1e9,
            normalize_routing_weights=1,
        )
        inputs = [value("x", number, ["t", "h"]), value("logits", number, ["t", "e"])]
        inputs += [value(name, number, list(w.shape)) for name, w in self.weights.items()]
        graph = onnx.helper.make_graph([node], self.name, inputs, [value("y", number, ["t", "h"])])
        opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Its own threads would spin on after a call, at the cost of whoever is timed next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.binding = self.session.io_binding()
        for name, w in self.weights.items():
            self.binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(w))
        self.binding.bind_output("y")

    def call(self, routing: Routing) -> torch.Tensor:
        ids, weights = routing
        if self.session is None:
            self._open(ids.shape[1])
        logits = torch.full((len(ids), self.experts), -1e30).scatter_(1, ids, weights.log())
        self.binding.bind_cpu_input("x", self.x.numpy())
        self.binding.bind_cpu_input("logits", logits.numpy())
        self.session.run_with_iobinding(self.binding)
        return torch.from_numpy(self.binding.copy_outputs_to_cpu()[0]) * weights.sum(1, keepdim=True)


MOE_PEERS: tuple[type[MoePeer], ...] = (LoopBf16, LoopFp32, GroupedBf16, OnnxRuntimeMoe)
