"""What a model's layers ask the ops for: prepared calls, on operands from where the caller says."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from moekern import models, ops
from moekern.experts import ExpertWeights
from moekern.layout import GroupedLayout
from moekern.op import Op
from moekern.scaled import BLOCK, ScaledTensor

ACTIVATIONS = ("fp8", "bf16")  # of products: W8A8 and W8A16
_NORESERVE = 0x4000  # Linux: mmap.MAP_NORESERVE of later Pythons


@dataclass(frozen=True)
class Call:
    op: Op
    what: str
    prepared: tuple[Any, ...]


class Memory(Protocol):
    """Where operands and results come from."""

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor: ...
    def scaled(self, shape: tuple[int, ...], block: tuple[int, int]) -> ScaledTensor: ...
    def ids(self, shape: tuple[int, int], experts: int, dtype: torch.dtype) -> torch.Tensor: ...


class Addresses:
    """Memory that nobody touches: a layer of experts may be larger than that of the machine that compiles."""

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        count = math.prod(shape) * dtype.itemsize
        pages = mmap.mmap(-1, max(count, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
        return torch.frombuffer(pages, dtype=torch.uint8)[:count].view(dtype).view(shape)

    def scaled(self, shape: tuple[int, ...], block: tuple[int, int]) -> ScaledTensor:
        data = self.tensor(shape, torch.float8_e4m3fn)
        return ScaledTensor(data, self.tensor(_grid(shape, block), torch.float32), block)

    def ids(self, shape: tuple[int, int], experts: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)


class Values:
    """Random operands on a device, on which every order of summation gives the same bits.

    Small integers, with scales that are powers of two: a sum over 2^16 columns has at most 24 bits, one over the 128 of
    a block 12. (Hopper's FP8 units keep 14.)
    """

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(-4, 5, shape, device=self._device, generator=self._generator, dtype=torch.int8).to(dtype)

    def scaled(self, shape: tuple[int, ...], block: tuple[int, int]) -> ScaledTensor:
        halves = torch.randint(0, 2, _grid(shape, block), device=self._device, generator=self._generator)
        return ScaledTensor(self.tensor(shape, torch.float8_e4m3fn), 2.0**-4 / (1 + halves), block)

    def ids(self, shape: tuple[int, int], experts: int, dtype: torch.dtype) -> torch.Tensor:
        scores = torch.rand(shape[0], experts, device=self._device, generator=self._generator)
        return scores.topk(shape[1], 1).indices.to(dtype)


def calls(
    model: models.Model, tokens: Sequence[int], activations: Sequence[str] = ACTIVATIONS, memory: Memory | None = None
) -> Iterator[Call]:
    """What layers of the model ask for, with every number of tokens. memory: `Addresses`, unless it is given."""
    memory = memory or Addresses()
    for linear in model.linears:
        b = memory.scaled((linear.n, linear.k), model.block)
        for count in tokens:
            out = memory.tensor((count, linear.n), torch.bfloat16)
            x = memory.tensor((count, linear.k), torch.bfloat16)
            said = f"{linear.name}: {count} x {linear.n} x {linear.k}"
            if "fp8" in activations:
                yield _cast(x, memory)
                a = memory.scaled((count, linear.k), (1, BLOCK))
                yield Call(ops.fp8_gemm_nt, said, ops.fp8_gemm_nt.prepare(a, b, out=out))
            if "bf16" in activations:
                yield Call(ops.fp8_gemm_nt, f"{said}, bf16", ops.fp8_gemm_nt.prepare(x, b, out=out))
    if model.experts is not None:
        yield from _experts(model, tokens, activations, memory)


def _cast(x: torch.Tensor, memory: Memory) -> Call:
    rows, columns = x.shape
    return Call(
        ops.per_token_cast_to_fp8, f"{rows} x {columns}",
        ops.per_token_cast_to_fp8.prepare(x, out=memory.scaled((rows, columns), (1, BLOCK))),
    )  # fmt: skip


def _experts(model: models.Model, tokens: Sequence[int], activations: Sequence[str], memory: Memory) -> Iterator[Call]:
    """Of a router and its experts: in one call, and sorted, multiplied and brought back one by one."""
    of = model.experts
    assert of is not None
    groups, hidden, size = of.count, of.hidden, of.intermediate
    w13, w2 = memory.scaled((groups, 2 * size, hidden), model.block), memory.scaled((groups, hidden, size), model.block)
    experts = ExpertWeights(w13, w2)
    shared = None
    if of.shared:
        shared = ExpertWeights(
            memory.scaled((of.shared, 2 * size, hidden), model.block),
            memory.scaled((of.shared, hidden, size), model.block),
        )
    bias = memory.tensor((groups,), torch.float32) if of.correction_bias else None
    for count in tokens:
        x = memory.tensor((count, hidden), torch.bfloat16)
        out = memory.tensor((count, hidden), torch.bfloat16)
        weights = memory.tensor((count, of.top_k), torch.float32)
        for dtype in (torch.float32, torch.bfloat16):
            gate = ops.moe_gate.prepare(
                memory.tensor((count, groups), dtype), of.top_k, scoring=of.scoring, correction_bias=bias,
                num_expert_group=of.groups, topk_group=of.kept_groups, renormalize=of.renormalise,
                routed_scaling_factor=of.scaling,
            )  # fmt: skip
            yield Call(ops.moe_gate, f"{count} x {groups}, {str(dtype).removeprefix('torch.')}", gate)
        for dtype in (torch.int32, torch.int64):
            ids = memory.ids((count, of.top_k), groups, dtype)
            said = f"{count} tokens, {str(ids.dtype).removeprefix('torch.')}"
            for beside in dict.fromkeys((None, shared)):
                for kind in activations:
                    prepared = ops.fused_experts.prepare(
                        x, experts, ids, weights, quantize_activations=kind == "fp8", shared=beside, out=out
                    )
                    yield Call(ops.fused_experts, f"{said}, {kind}{', shared' if beside else ''}", prepared)
            yield Call(ops.moe_permute, said, ops.moe_permute.prepare(x, ids, groups))
            if "fp8" in activations:
                cast = ops.moe_permute.prepare(x, ids, groups, format="e4m3fn")
                yield Call(ops.moe_permute, f"{said}, cast", cast)
        slots = count * of.top_k
        even = torch.full((groups,), slots // groups, device=ids.device)
        even[: slots % groups] += 1
        layout = GroupedLayout.from_counts(even)
        masked = GroupedLayout.from_masked(even.clamp(max=count), count)
        for kind in activations:
            for w in (w13, w2):
                n, k = w.shape[-2:]
                for op, rows, which in (
                    (ops.m_grouped_fp8_gemm_nt_contiguous, (slots,), layout),
                    (ops.m_grouped_fp8_gemm_nt_masked, (groups, count), masked),
                ):
                    a = (
                        memory.scaled((*rows, k), (1, BLOCK))
                        if kind == "fp8"
                        else memory.tensor((*rows, k), torch.bfloat16)
                    )
                    prepared = op.prepare(a, w, which, out=memory.tensor((*rows, n), torch.bfloat16))
                    yield Call(op, f"{' x '.join(map(str, (*rows, n, k)))}, {kind}", prepared)
        if "fp8" in activations:
            gated = memory.tensor((slots, 2 * size), torch.bfloat16)
            h = ops.silu_mul_cast_to_fp8.prepare(gated, out=memory.scaled((slots, size), (1, BLOCK)))
            yield Call(ops.silu_mul_cast_to_fp8, f"{slots} x {size}", h)
            yield _cast(x, memory)
            yield _cast(memory.tensor((slots, hidden), torch.bfloat16), memory)
        y, inverse = memory.tensor((slots, hidden), torch.bfloat16), memory.ids((count, of.top_k), slots, torch.int32)
        back = ops.moe_unpermute.prepare(y, inverse, weights, out=out)
        yield Call(ops.moe_unpermute, f"{count} x {hidden}", back)


def _grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    *groups, rows, columns = shape
    return (*groups, -(-rows // block[0]), -(-columns // block[1]))
