"""The ops as torch.library operators: for torch.compile, torch.export, fake tensors and autograd.

Eager calls on plain tensors never come here (op.py sends them straight to C++). The operators are
functional; `out=` under tracing is a copy, which the compiler folds away.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from moekern import ops
from moekern.experts import ExpertWeights
from moekern.layout import GroupedLayout, at_hand
from moekern.op import NotSupported
from moekern.ops import Permuted, Routing, permuted_rows
from moekern.ops.gate import SMALLEST_SUM
from moekern.scaled import BLOCK, DTYPES, ScaledTensor, parts
from moekern.weights import from_lists, to_lists

_LIBRARY = torch.library.Library("moekern", "DEF")
_KEYS = ("CPU", "CUDA", "PrivateUse1")  # HIP devices dispatch as CUDA, Ascend's as PrivateUse1


def _define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    for key in _KEYS:
        _LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"moekern::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.moekern, name).default


def _left_parts(a):  # type: ignore[no-untyped-def]
    if isinstance(a, torch.Tensor):
        return a, None, [1, 1]
    data, scale, block = parts(a)
    return data, scale, list(block)


def _left(a, sa, block_a):  # type: ignore[no-untyped-def]
    return a if sa is None else ScaledTensor(a, sa, tuple(block_a))


# ---- fp8_gemm_nt -------------------------------------------------------------------------------------


def _gemm(a, sa, block_a, b, sb, block_b, c, bias, out_dtype):  # type: ignore[no-untyped-def]
    return ops.fp8_gemm_nt(_left(a, sa, block_a), ScaledTensor(b, sb, tuple(block_b)), c, bias, None, out_dtype)


def _gemm_fake(a, sa, block_a, b, sb, block_b, c, bias, out_dtype):  # type: ignore[no-untyped-def]
    torch._check(a.dim() == 2 and b.dim() == 2, lambda: "fp8_gemm_nt: a and b must have 2 dimensions")
    torch._check(a.shape[1] == b.shape[1], lambda: "fp8_gemm_nt: a and b need the same number of columns, k")
    dtype = out_dtype or (torch.bfloat16 if sa is not None else a.dtype)
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


def _save_for_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    a, sa, _, b, sb, block_b, c, bias, _ = inputs
    ctx.save_for_backward(b, sb)
    ctx.block_b = block_b
    ctx.a_dtype = a.dtype if sa is None else None  # FP8 activations have no gradient
    ctx.c_dtype = None if c is None else c.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gemm_backward(ctx, grad):  # type: ignore[no-untyped-def]
    """dA = dD B, with the frozen FP8 weights as they are; dC = dD; d(bias) = its column sums."""
    b, sb = ctx.saved_tensors
    grad_a = grad_c = grad_bias = None
    if ctx.needs_input_grad[0] and ctx.a_dtype is not None:
        rows, cols = ctx.block_b
        grad_a = torch.ops.moekern.fp8_gemm_nt(grad, None, [1, 1], b.T, sb.T, [cols, rows], None, None, ctx.a_dtype)
    if ctx.needs_input_grad[6]:
        grad_c = grad.to(ctx.c_dtype)
    if ctx.needs_input_grad[7]:
        grad_bias = grad.to(torch.float32).sum(0).to(ctx.bias_dtype)
    return grad_a, None, None, None, None, None, grad_c, grad_bias, None


def _trace_gemm(a, b, c=None, bias=None, out=None, out_dtype=None):  # type: ignore[no-untyped-def]
    data_b, scale_b, block_b = parts(b)
    dtype = out_dtype if out is None else out.dtype
    result = torch.ops.moekern.fp8_gemm_nt(*_left_parts(a), data_b, scale_b, list(block_b), c, bias, dtype)
    return result if out is None else out.copy_(result)


# ---- grouped products --------------------------------------------------------------------------------
#
# Weights are lists of tensors: one that is a stack, or a matrix for every group. The layout's values are
# checked where the operator runs, unless that is an accelerator; a graph has none.

_WEIGHTS_AND_LAYOUT = "Tensor[] b, Tensor[] sb, int[] block_b, Tensor starts, Tensor counts, SymInt rows"


def _define_m_grouped(op: Any) -> None:
    """One of the two m-grouped products; `capacity` makes it the masked one."""

    def run(a, sa, block_a, b, sb, block_b, starts, counts, rows, capacity, out_dtype):  # type: ignore[no-untyped-def]
        layout = GroupedLayout(starts, counts, rows, capacity=capacity, check=at_hand(starts))
        return op(_left(a, sa, block_a), from_lists(b, sb, block_b, op.name), layout, None, out_dtype)

    def fake(a, sa, block_a, b, sb, block_b, starts, counts, rows, capacity, out_dtype):  # type: ignore[no-untyped-def]
        dimensions = 2 if capacity is None else 3
        torch._check(a.dim() == dimensions, lambda: f"{op.name}: a must have {dimensions} dimensions")
        torch._check(a.shape[-1] == b[0].shape[-1], lambda: f"{op.name}: a and b need the same number of columns, k")
        return a.new_empty(
            (*a.shape[:-1], b[0].shape[-2]), dtype=out_dtype or (a.dtype if sa is None else torch.bfloat16)
        )

    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        a, sa, _, b, sb, block_b, starts, counts, rows, capacity, _ = inputs
        ctx.save_for_backward(*b, *sb, starts, counts)
        ctx.block_b, ctx.rows, ctx.capacity = block_b, rows, capacity
        ctx.a_dtype = a.dtype if sa is None else None  # FP8 activations have no gradient

    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        """dA = dD B, group by group, with the frozen FP8 weights as they are."""
        grad_a = None
        *weights, starts, counts = ctx.saved_tensors
        matrices = len(weights) // 2
        if ctx.needs_input_grad[0] and ctx.a_dtype is not None:
            b, sb = ([w.mT for w in group] for group in (weights[:matrices], weights[matrices:]))
            block = [ctx.block_b[1], ctx.block_b[0]]
            grad_a = call(grad, None, [1, 1], b, sb, block, starts, counts, ctx.rows, ctx.capacity, ctx.a_dtype)
        return grad_a, None, None, [None] * matrices, [None] * matrices, *[None] * 6

    def trace(a, b, layout, out=None, out_dtype=None):  # type: ignore[no-untyped-def]
        dtype = out_dtype if out is None else out.dtype
        result = call(*_left_parts(a), *to_lists(b), layout.starts, layout.counts, layout.rows, layout.capacity, dtype)
        if out is None:
            return result
        owned = (layout.indices() >= 0).view(*result.shape[:-1], 1)
        return out.copy_(torch.where(owned, result, out))

    call = _define(
        f"{op.name}(Tensor a, Tensor? sa, int[] block_a, {_WEIGHTS_AND_LAYOUT}, SymInt? capacity, "
        "ScalarType? out_dtype) -> Tensor",
        run,
        fake,
    )
    torch.library.register_autograd(f"moekern::{op.name}", backward, setup_context=save, lib=_LIBRARY)
    op.traced = trace


def _k_grouped(a, sa, block_a, b, sb, block_b, starts, counts, rows, c, out_dtype):  # type: ignore[no-untyped-def]
    layout = GroupedLayout(starts, counts, rows, check=at_hand(starts))
    right = ScaledTensor(b, sb, tuple(block_b))
    return ops.k_grouped_fp8_gemm_tn_contiguous(_left(a, sa, block_a), right, layout, c, None, out_dtype)


def _k_grouped_fake(a, sa, block_a, b, sb, block_b, starts, counts, rows, c, out_dtype):  # type: ignore[no-untyped-def]
    name = ops.k_grouped_fp8_gemm_tn_contiguous.name
    torch._check(a.dim() == 2 and b.dim() == 2, lambda: f"{name}: a and b must have 2 dimensions")
    torch._check(a.shape[0] == b.shape[0], lambda: f"{name}: a and b need the same number of rows")
    return a.new_empty((counts.shape[0], a.shape[1], b.shape[1]), dtype=out_dtype or torch.float32)


def _trace_k_grouped(a, b, layout, c=None, out=None, out_dtype=None):  # type: ignore[no-untyped-def]
    data, scale, block = parts(b)
    dtype = out_dtype if out is None else out.dtype
    result = torch.ops.moekern.k_grouped_fp8_gemm_tn_contiguous(
        *_left_parts(a), data, scale, list(block), layout.starts, layout.counts, layout.rows, c, dtype
    )
    return result if out is None else out.copy_(result)


# ---- casts -------------------------------------------------------------------------------------------


def _define_cast(op: Any, block: tuple[int, int], gated: bool) -> Callable[..., Any]:
    def run(x, format, round_scale_up):  # type: ignore[no-untyped-def]
        result = op(x, format, round_scale_up)
        return result.data, result.scale

    def fake(x, format, round_scale_up):  # type: ignore[no-untyped-def]
        torch._check(x.dim() == 2, lambda: f"{op.name}: x must have 2 dimensions")
        rows, cols = x.shape[0], x.shape[1] // 2 if gated else x.shape[1]
        grid = ((rows + block[0] - 1) // block[0], (cols + block[1] - 1) // block[1])
        return x.new_empty((rows, cols), dtype=DTYPES[format]), x.new_empty(grid, dtype=torch.float32)

    call = _define(f"{op.name}(Tensor x, str format, bool round_scale_up) -> (Tensor, Tensor)", run, fake)

    def trace(x, format="e4m3fn", round_scale_up=False, out=None):  # type: ignore[no-untyped-def]
        data, scale = call(x, format, round_scale_up)
        if out is None:
            return ScaledTensor(data, scale, block)
        out.data.copy_(data)
        out.scale.copy_(scale)
        return out

    return trace


def _dequantize(data, scale, block, out_dtype):  # type: ignore[no-untyped-def]
    return ops.dequantize(ScaledTensor(data, scale, tuple(block)), None, out_dtype)


def _dequantize_fake(data, scale, block, out_dtype):  # type: ignore[no-untyped-def]
    return data.new_empty(data.shape, dtype=out_dtype or torch.float32)


def _trace_dequantize(x, out=None, out_dtype=None):  # type: ignore[no-untyped-def]
    data, scale, block = parts(x)
    dtype = out_dtype if out is None else out.dtype
    result = torch.ops.moekern.dequantize(data, scale, list(block), dtype)
    return result if out is None else out.copy_(result)


# ---- fused_experts -----------------------------------------------------------------------------------


_TABLES: dict[Any, object] = {}  # ExpertWeights.table by all that it depends on: it holds addresses and no memory
_MOST_TABLES = 1024


def _same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _known(tensors: list[torch.Tensor], layout: list[int]) -> ExpertWeights:
    """The ExpertWeights of these. Checking hundreds of matrices takes milliseconds, so it is done once."""
    alive = ExpertWeights.alive.get(id(tensors[0]))
    if alive is not None and alive.layout == tuple(layout) and _same(alive.tensors, tensors):
        return alive
    if tensors[0].device.type != "cpu":  # whose kernels want more than a table
        return ExpertWeights.from_tensors(tensors, layout)
    key = tuple(layout), tuple((x.data_ptr(), x.dtype, x.shape, x.stride()) for x in tensors)
    if (table := _TABLES.get(key)) is not None:
        return ExpertWeights.from_table(table)
    experts = ExpertWeights.from_tensors(tensors, layout)
    if len(_TABLES) >= _MOST_TABLES:
        _TABLES.pop(next(iter(_TABLES)), None)
    _TABLES[key] = experts.table
    return experts


_EXPERT_OPTIONS = ("activation", "alpha", "beta", "limit", "quantize_activations", "apply_router_weight_on_input",
                   "reduce", "out_dtype")  # fmt: skip


def _experts(  # type: ignore[no-untyped-def]
    x, sx, block_x, experts, layout, shared, shared_layout, ids, weights, expert_map, *options
):
    return ops.fused_experts(
        x if sx is None else ScaledTensor(x, sx, tuple(block_x)),
        _known(experts, layout),
        ids,
        weights,
        expert_map=expert_map,
        shared=_known(shared, shared_layout) if shared else None,
        **dict(zip(_EXPERT_OPTIONS, options, strict=True)),
    )


def _experts_fake(  # type: ignore[no-untyped-def]
    x, sx, block_x, experts, layout, shared, shared_layout, ids, weights, expert_map, *options
):
    torch._check(x.dim() == 2 and ids.dim() == 2, lambda: "fused_experts: x and ids must have 2 dimensions")
    torch._check(x.shape[0] == ids.shape[0], lambda: "fused_experts: x and ids need the same number of rows")
    reduce, out_dtype = options[-2:]
    rows = x.shape[0] if reduce else x.shape[0] * ids.shape[1]
    return x.new_empty((rows, x.shape[1]), dtype=out_dtype or (torch.bfloat16 if sx is not None else x.dtype))


def _no_gradient(ctx, grad):  # type: ignore[no-untyped-def]
    raise NotSupported("fused_experts has no gradient; call it under torch.no_grad()")


def _trace_experts(  # type: ignore[no-untyped-def]
    x,
    experts,
    ids,
    weights=None,
    *,
    activation="swiglu",
    alpha=1.0,
    beta=0.0,
    limit=None,
    quantize_activations=False,
    apply_router_weight_on_input=False,
    expert_map=None,
    shared=None,
    reduce=True,
    out=None,
    out_dtype=None,
    workspace=None,
):
    data, scale, block = (x, None, (1, 1)) if isinstance(x, torch.Tensor) else parts(x)
    of_shared = ([], []) if shared is None else (shared.tensors, list(shared.layout))
    operands = (data, scale, list(block), experts.tensors, list(experts.layout), *of_shared, ids, weights, expert_map)
    numbers = (float(alpha), float(beta), None if limit is None else float(limit))
    dtype = out_dtype if out is None else out.dtype
    result = torch.ops.moekern.fused_experts(
        *operands, activation, *numbers, quantize_activations, apply_router_weight_on_input, reduce, dtype
    )
    return result if out is None else out.copy_(result)


# ---- moe_gate, moe_permute, moe_unpermute ------------------------------------------------------------


_GATE_OPTIONS = (
    "scoring",
    "correction_bias",
    "num_expert_group",
    "topk_group",
    "renormalize",
    "routed_scaling_factor",
    "mask_value",
)


def _gate(logits, topk, *options):  # type: ignore[no-untyped-def]
    return tuple(ops.moe_gate(logits, topk, **dict(zip(_GATE_OPTIONS, options, strict=True))))


def _gate_fake(logits, topk, *options):  # type: ignore[no-untyped-def]
    torch._check(logits.dim() == 2, lambda: "moe_gate: logits must have 2 dimensions")
    shape = (logits.shape[0], topk)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


def _save_gate(ctx, inputs, output):  # type: ignore[no-untyped-def]
    logits, _, scoring, _, _, _, renormalize, routed_scaling_factor, _ = inputs
    ctx.save_for_backward(logits, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.options = scoring, renormalize, routed_scaling_factor


def _gate_backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    """Through the weights of the chosen experts; which they are has no gradient."""
    logits, ids = ctx.saved_tensors
    scoring, renormalize, routed_scaling_factor = ctx.options
    scores = logits.float().softmax(1) if scoring == "softmax" else logits.float().sigmoid()
    chosen, grad = scores.gather(1, ids.long()), grad * routed_scaling_factor
    if renormalize:
        total = chosen.sum(1, keepdim=True) + SMALLEST_SUM
        grad = (grad - (grad * chosen).sum(1, keepdim=True) / total) / total
    grad = torch.zeros_like(scores).scatter(1, ids.long(), grad)
    if scoring == "softmax":
        grad = scores * (grad - (grad * scores).sum(1, keepdim=True))
    else:
        grad = grad * scores * (1 - scores)
    return grad.to(logits.dtype), *(None,) * 8


def _trace_gate(  # type: ignore[no-untyped-def]
    logits, topk, *, scoring="softmax", correction_bias=None, num_expert_group=1, topk_group=1, renormalize=False,
    routed_scaling_factor=1.0, mask_value=-math.inf, out=None,
):  # fmt: skip
    weights, ids = torch.ops.moekern.moe_gate(
        logits, topk, scoring, correction_bias, num_expert_group, topk_group, renormalize,
        float(routed_scaling_factor), float(mask_value),
    )  # fmt: skip
    if out is None:
        return Routing(weights, ids)
    return Routing(out[0].copy_(weights), out[1].copy_(ids))


def _permute(  # type: ignore[no-untyped-def]
    x, scale, block, ids, num_experts, alignment, expert_map, format, round_scale_up
):
    rows = x if scale is None else ScaledTensor(x, scale, tuple(block))
    moved, layout, inverse = ops.moe_permute(
        rows, ids, num_experts, alignment=alignment, expert_map=expert_map, format=format, round_scale_up=round_scale_up
    )
    data, scale = (moved, x.new_empty(0)) if isinstance(moved, torch.Tensor) else moved
    return data, scale, layout.starts, layout.counts, inverse


def _permute_fake(  # type: ignore[no-untyped-def]
    x, scale, block, ids, num_experts, alignment, expert_map, format, round_scale_up
):
    torch._check(x.dim() == 2 and ids.dim() == 2, lambda: "moe_permute: x and ids must have 2 dimensions")
    torch._check(x.shape[0] == ids.shape[0], lambda: "moe_permute: x and ids need the same number of rows, the tokens")
    rows = permuted_rows(ids.shape[0], ids.shape[1], num_experts, alignment)
    groups = ids.new_empty((2, num_experts), dtype=torch.int64)
    if format is not None:
        blocks = (x.shape[1] + BLOCK - 1) // BLOCK
        x, scale = x.new_empty(x.shape, dtype=DTYPES[format]), x.new_empty((0, blocks), dtype=torch.float32)
    return (
        x.new_empty((rows, x.shape[1])),
        x.new_empty(0) if scale is None else scale.new_empty((rows, scale.shape[1])),
        groups[0].clone(),
        groups[1].clone(),
        ids.new_empty(ids.shape, dtype=torch.int32),
    )


def _save_permute(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(output[4])
    constants = output[:2] if output[0].dtype.itemsize == 1 else ()  # FP8 rows
    ctx.mark_non_differentiable(*constants, *output[2:])


def _permute_backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
    """dx[t] = the sum of the gradients of the rows that are copies of x[t]."""
    (inverse,) = ctx.saved_tensors
    return torch.ops.moekern.moe_unpermute(grad, inverse, None, grad.dtype), *(None,) * 8


def _trace_permute(  # type: ignore[no-untyped-def]
    x, ids, num_experts, *, alignment=1, expert_map=None, format=None, round_scale_up=False, out=None
):
    data, scale, block = (x, None, (1, 1)) if isinstance(x, torch.Tensor) else parts(x)
    moved, moved_scale, starts, counts, inverse = torch.ops.moekern.moe_permute(
        data, scale, list(block), ids, num_experts, alignment, expert_map, format, round_scale_up
    )
    block = block if format is None else (1, BLOCK)
    if out is not None:
        target, _, out_inverse = out
        parts_of_target = (target,) if isinstance(target, torch.Tensor) else tuple(target)
        for to, result in zip(parts_of_target, (moved, moved_scale), strict=False):
            to[: moved.shape[0]].copy_(result[: to.shape[0]])
        layout = GroupedLayout(starts, counts, target.shape[0], alignment, check=at_hand(starts))
        return Permuted(target, layout, out_inverse.copy_(inverse))
    rows = moved if scale is None and format is None else ScaledTensor(moved, moved_scale, block)
    return Permuted(rows, GroupedLayout(starts, counts, moved.shape[0], alignment, check=at_hand(starts)), inverse)


def _unpermute(y, inverse, weights, out_dtype):  # type: ignore[no-untyped-def]
    return ops.moe_unpermute(y, inverse, weights, out_dtype=out_dtype)


def _unpermute_fake(y, inverse, weights, out_dtype):  # type: ignore[no-untyped-def]
    torch._check(y.dim() == 2 and inverse.dim() == 2, lambda: "moe_unpermute: y and inverse must have 2 dimensions")
    return y.new_empty((inverse.shape[0], y.shape[1]), dtype=out_dtype or y.dtype)


def _save_unpermute(ctx, inputs, output):  # type: ignore[no-untyped-def]
    y, inverse, weights, _ = inputs
    ctx.save_for_backward(y, inverse, weights)


def _unpermute_backward(ctx, grad):  # type: ignore[no-untyped-def]
    """dy[inverse[t, j]] = weights[t, j] dout[t], dweights[t, j] = <y[inverse[t, j]], dout[t]>; -1 takes no part."""
    y, inverse, weights = ctx.saved_tensors
    grad, kept = grad.float(), (inverse >= 0) & (inverse < y.shape[0])
    grad_y = grad_weights = None
    if ctx.needs_input_grad[0]:
        factors = kept.float() if weights is None else weights.float().where(kept, torch.zeros(()))
        terms = factors.unsqueeze(2) * grad.unsqueeze(1)
        rows = inverse.long().where(kept, torch.full_like(inverse, y.shape[0], dtype=torch.int64))  # one row too many
        sums = grad.new_zeros((y.shape[0] + 1, y.shape[1]))
        grad_y = sums.index_add(0, rows.flatten(), terms.flatten(0, 1))[: y.shape[0]].to(y.dtype)
    if weights is not None and ctx.needs_input_grad[2]:
        products = (y[inverse.long().where(kept, torch.zeros_like(inverse))].float() * grad.unsqueeze(1)).sum(2)
        grad_weights = products.where(kept, torch.zeros(())).to(weights.dtype)
    return grad_y, None, grad_weights, None


def _trace_unpermute(y, inverse, weights=None, *, out=None, out_dtype=None):  # type: ignore[no-untyped-def]
    result = torch.ops.moekern.moe_unpermute(y, inverse, weights, out_dtype if out is None else out.dtype)
    return result if out is None else out.copy_(result)


def _define_routing() -> None:
    _define(
        "moe_gate(Tensor logits, int topk, str scoring, Tensor? correction_bias, int num_expert_group, int topk_group, "
        "bool renormalize, float routed_scaling_factor, float mask_value) -> (Tensor, Tensor)",
        _gate,
        _gate_fake,
    )
    _define(
        "moe_permute(Tensor x, Tensor? scale, int[] block, Tensor ids, int num_experts, int alignment, "
        "Tensor? expert_map, str? format, bool round_scale_up) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _permute,
        _permute_fake,
    )
    _define(
        "moe_unpermute(Tensor y, Tensor inverse, Tensor? weights, ScalarType? out_dtype) -> Tensor",
        _unpermute,
        _unpermute_fake,
    )
    for name, backward, save in (
        ("moe_gate", _gate_backward, _save_gate),
        ("moe_permute", _permute_backward, _save_permute),
        ("moe_unpermute", _unpermute_backward, _save_unpermute),
    ):
        torch.library.register_autograd(f"moekern::{name}", backward, setup_context=save, lib=_LIBRARY)
    ops.moe_gate.traced = _trace_gate
    ops.moe_permute.traced = _trace_permute
    ops.moe_unpermute.traced = _trace_unpermute


def register() -> None:
    """Define every operator and give each Op its traced form. Called once, when moekern is imported."""
    _define(
        "fp8_gemm_nt(Tensor a, Tensor? sa, int[] block_a, Tensor b, Tensor sb, int[] block_b, "
        "Tensor? c, Tensor? bias, ScalarType? out_dtype) -> Tensor",
        _gemm,
        _gemm_fake,
    )
    torch.library.register_autograd(
        "moekern::fp8_gemm_nt", _gemm_backward, setup_context=_save_for_backward, lib=_LIBRARY
    )
    ops.fp8_gemm_nt.traced = _trace_gemm
    _define_m_grouped(ops.m_grouped_fp8_gemm_nt_contiguous)
    _define_m_grouped(ops.m_grouped_fp8_gemm_nt_masked)
    _define(
        "k_grouped_fp8_gemm_tn_contiguous(Tensor a, Tensor? sa, int[] block_a, Tensor b, Tensor sb, int[] block_b, "
        "Tensor starts, Tensor counts, SymInt rows, Tensor? c, ScalarType? out_dtype) -> Tensor",
        _k_grouped,
        _k_grouped_fake,
    )
    ops.k_grouped_fp8_gemm_tn_contiguous.traced = _trace_k_grouped
    for op, block, gated in (
        (ops.per_token_cast_to_fp8, (1, BLOCK), False),
        (ops.per_block_cast_to_fp8, (BLOCK, BLOCK), False),
        (ops.per_channel_cast_to_fp8, (BLOCK, 1), False),
        (ops.silu_mul_cast_to_fp8, (1, BLOCK), True),
    ):
        op.traced = _define_cast(op, block, gated)
    _define(
        "dequantize(Tensor data, Tensor scale, int[] block, ScalarType? out_dtype) -> Tensor",
        _dequantize,
        _dequantize_fake,
    )
    ops.dequantize.traced = _trace_dequantize
    _define(
        "fused_experts(Tensor x, Tensor? sx, int[] block_x, Tensor[] experts, int[] layout, Tensor[] shared, "
        "int[] shared_layout, Tensor ids, Tensor? weights, Tensor? expert_map, str activation, float alpha, "
        "float beta, float? limit, bool quantize_activations, bool apply_router_weight_on_input, bool reduce, "
        "ScalarType? out_dtype) -> Tensor",
        _experts,
        _experts_fake,
    )
    torch.library.register_autograd("moekern::fused_experts", _no_gradient, lib=_LIBRARY)
    ops.fused_experts.traced = _trace_experts
    _define_routing()
