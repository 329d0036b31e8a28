"""fused_experts: the experts of a Mixture-of-Experts layer. Next: op.py, then backends/<device>/."""

from __future__ import annotations

import math
from typing import Any

import torch

from moekern import _C
from moekern.experts import Expert, ExpertWeights
from moekern.layout import GroupedLayout, at_hand
from moekern.op import device_of, op
from moekern.ops.quantize import reference_cast
from moekern.scaled import BLOCK, FORMATS, ScaledTensor, as_scaled, as_tensor

ACTIVATIONS = ("swiglu", "gelu", "gelu_tanh")
_ALIASES = {"silu": "swiglu"}


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"fused_experts: {name} is a {type(value).__name__}; it is a number")
    if not math.isfinite(value):
        raise ValueError(f"fused_experts: {name} is {value}; it must be finite")
    return float(value)


def _prepare(
    x: Any,
    experts: ExpertWeights,
    ids: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    activation: str = "swiglu",
    alpha: float = 1.0,
    beta: float = 0.0,
    limit: float | None = None,
    quantize_activations: bool = False,
    apply_router_weight_on_input: bool = False,
    expert_map: torch.Tensor | None = None,
    shared: ExpertWeights | None = None,
    reduce: bool = True,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    workspace: torch.Tensor | None = None,
) -> tuple[Any, ...]:
    if type(x) is not ScaledTensor:
        x = as_scaled(x, "fused_experts: x") if isinstance(x, (tuple, list)) else as_tensor(x, "fused_experts: x")
    for name, value in (("experts", experts), ("shared", shared)):
        if not isinstance(value, ExpertWeights) and not (name == "shared" and value is None):
            raise TypeError(f"fused_experts: {name} is a {type(value).__name__}; it must be an ExpertWeights")
        if value is not None and value.table is None:
            raise TypeError(f"fused_experts: {name} was made of fake tensors; there is nothing to read")
    ids = as_tensor(ids, "fused_experts: ids")
    if weights is not None:
        weights = as_tensor(weights, "fused_experts: weights")
    if expert_map is not None:
        expert_map = as_tensor(expert_map, "fused_experts: expert_map")
    activation = _ALIASES.get(activation, activation)
    if activation not in ACTIVATIONS:
        raise ValueError(f"fused_experts: activation is {activation!r}; it is one of {', '.join(ACTIVATIONS)} or silu")
    alpha, beta = _number("alpha", alpha), _number("beta", beta)
    if activation != "swiglu" and (alpha, beta) != (1.0, 0.0):
        name = "alpha" if alpha != 1.0 else "beta"
        raise ValueError(f"fused_experts: {name} is for swiglu; activation is {activation}")
    if limit is not None and (limit := _number("limit", limit)) <= 0:
        raise ValueError(f"fused_experts: limit is {limit}; it must be positive")
    for name, flag in (
        ("quantize_activations", quantize_activations),
        ("apply_router_weight_on_input", apply_router_weight_on_input),
        ("reduce", reduce),
    ):
        if not isinstance(flag, bool):
            raise TypeError(f"fused_experts: {name} is {flag!r}; it is True or False")
    return _C.prepare_experts(
        x, experts, ids, weights, activation, alpha, beta, limit, quantize_activations, apply_router_weight_on_input,
        expert_map, shared, reduce, out, out_dtype, workspace,
    )  # fmt: skip


@op(prepare=_prepare)
def fused_experts(
    x: Any,
    experts: ExpertWeights,
    ids: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    activation: str = "swiglu",
    alpha: float = 1.0,
    beta: float = 0.0,
    limit: float | None = None,
    quantize_activations: bool = False,
    apply_router_weight_on_input: bool = False,
    expert_map: torch.Tensor | None = None,
    shared: ExpertWeights | None = None,
    reduce: bool = True,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """The feed-forward experts of a Mixture-of-Experts layer, with a given routing.

    out[t] = cast(sum_j weights[t, j] y(e, x[t]) + sum_s y(s, x[t])), where e is expert ids[t, j], s every shared
    expert, and of one expert, with its biases b,

        g = Wgate x + bg,  u = Wup x + bu;  with a limit: g = min(g, limit), u = clamp(u, -limit, limit)
        h = (u + beta) g sigmoid(alpha g)  "swiglu" (or "silu", its name elsewhere), or gelu(g) u
        y = Wdown round(h) + bd

    round: to x's dtype (W8A16), or quantised as by `per_token_cast_to_fp8` (W8A8). Nothing else is rounded
    but for float32 sums, in a fixed order; the result is cast once.

    x: [T, H] float32, float16 or bfloat16; or FP8 with 1x128 scales, a ScaledTensor or (data, scale): W8A8.
    experts: ExpertWeights, used in place.
    ids: [T, k] int32 or int64. -1 skips the slot, its weight included. An expert that a row names twice
        counts twice.
    weights: [T, k] float32, or None for ones. NaN stays in its token.
    activation, alpha, beta, limit: "swiglu", "gelu" or "gelu_tanh"; gpt-oss has swiglu with alpha=1.702, beta=1
        and limit=7.
    quantize_activations: cast x to 1x128 FP8 (e4m3fn) first, and h too.
    apply_router_weight_on_input: weights multiply x (exactly: the products of gate and up) instead of y.
    expert_map: [all experts] int32 or int64: ids are of all experts, and the map says which of `experts` each is,
        or -1 where it lives elsewhere.
    shared: ExpertWeights applied to every token with weight 1.
    reduce: False leaves out the sum and its weights: out [T k, H] holds y of every slot, zeros where it is skipped.
    out: [T, H] (or [T k, H]) to write to, or None to allocate.
    out_dtype: torch.bfloat16, float16 or float32; of `out` if given, else of a float x, else bfloat16.
    workspace: torch.uint8 [bytes] for intermediate results; see `fused_experts_workspace`. A compiler ignores it.

    Two calls on one machine give the same bits whatever the number of threads. Raises ValueError or TypeError
    naming the argument; NotSupported when no kernel takes the call. What ids and expert_map hold is checked, too; on
    an accelerator it is not looked at, and what names no expert counts as -1.
    Method: DeepSeek-V3 (arXiv:2412.19437, section 2.1.2); gpt-oss (openai/gpt-oss, torch/model.py: swiglu).
    """
    if expert_map is not None:
        ids = torch.where(ids < 0, -1, expert_map.to(torch.int64)[ids.clamp(min=0).to(torch.int64)])
    quantise = quantize_activations or isinstance(x, ScaledTensor)
    if quantise and not isinstance(x, ScaledTensor):
        x = reference_cast(x, (1, BLOCK), "e4m3fn", round_scale_up=False)
    exact = x.to_float64() if isinstance(x, ScaledTensor) else x.to(torch.float64)

    def hidden(e: Expert, rows: torch.Tensor, factor: torch.Tensor | float) -> torch.Tensor:
        gate, up = factor * (rows @ e.gate.T), factor * (rows @ e.up.T)
        if e.gate_bias is not None and e.up_bias is not None:
            gate, up = gate + e.gate_bias, up + e.up_bias
        h = gated(gate, up, activation, alpha, beta, limit)
        if quantise:
            return reference_cast(h.to(torch.float32), (1, BLOCK), "e4m3fn", round_scale_up=False).to_float64()
        return h.to(torch.float32).to(x.dtype).to(torch.float64)

    def output(e: Expert, rows: torch.Tensor, factor: torch.Tensor | float = 1.0) -> torch.Tensor:
        y = hidden(e, rows, factor) @ e.down.T
        return y if e.down_bias is None else y + e.down_bias

    tokens, k = ids.shape
    w = torch.ones(tokens, k) if weights is None else weights
    w = w.to(torch.float64).unsqueeze(2).where(ids.unsqueeze(2) >= 0, torch.zeros(()).double())
    slots = torch.zeros(tokens, k, exact.shape[1], dtype=torch.float64)
    for index in ids[ids >= 0].unique().tolist():
        t, j = (ids == index).nonzero(as_tuple=True)
        slots[t, j] = output(experts.expert(index), exact[t], w[t, j] if apply_router_weight_on_input else 1.0)
    if not reduce:
        return slots.flatten(0, 1)
    total = (slots if apply_router_weight_on_input else w * slots).sum(1)
    for index in range(shared.num_experts if shared is not None else 0):
        assert shared is not None
        total = total + output(shared.expert(index), exact)
    return total


def gated(
    g: torch.Tensor, u: torch.Tensor, activation: str, alpha: float, beta: float, limit: float | None
) -> torch.Tensor:
    """h of the equation, in float64."""
    if limit is not None:
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    if activation == "gelu":
        return 0.5 * g * torch.erfc(-g / math.sqrt(2)) * u
    if activation == "gelu_tanh":
        return 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * u
    return (u + beta) * g * torch.sigmoid(alpha * g)


def fused_experts_workspace(
    tokens: int, top_k: int, experts: ExpertWeights, *, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> int:
    """Bytes of `workspace` for `fused_experts` with x [tokens, H] of `dtype`, whatever the values of its operands.

    Takes the op's other options, such as shared=, quantize_activations= and reduce=. The answer is of the kernel that
    such a call runs now: `moekern.use` may choose another.
    """
    device = experts.tensors[0].device
    x: Any = torch.empty(1, experts.hidden_size, dtype=dtype, device=device).expand(tokens, -1)
    if dtype in FORMATS:
        x = ScaledTensor(
            x, torch.ones(1, 1, device=device).expand(tokens, -(-experts.hidden_size // BLOCK)), (1, BLOCK)
        )
    ids = torch.zeros(1, 1, dtype=torch.int32, device=device).expand(tokens, top_k)
    call = fused_experts.prepare(x, experts, ids, **options)
    kernel = fused_experts.select(device_of(call[fused_experts.output_index]), *call)
    return 0 if kernel.workspace is None else kernel.workspace(*call)


def batched_experts(
    x: torch.Tensor,
    experts: ExpertWeights,
    counts: torch.Tensor | GroupedLayout,
    *,
    out: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """`fused_experts` on tokens that lie expert by expert, as after an all-to-all of fixed size.

    out[e, i] = y(e, x[e, i]) for i < counts[e], and 0 for the rest

    x: [E, rows, H] float32, float16 or bfloat16, copied if its experts do not lie one after the other. Rows past
        the count are not read.
    counts: [E] int32 or int64, or a GroupedLayout of that kind (`from_masked`). On an accelerator its values are not
        looked at: a count beyond `rows` is all of them.
    out: [E, rows, H], contiguous, or None to allocate. Other options are those of `fused_experts`.
    """
    if x.dim() != 3 or len(x) != experts.num_experts:
        raise ValueError(
            f"batched_experts: x has shape {list(x.shape)}; it must be [{experts.num_experts}, rows, "
            f"{experts.hidden_size}]"
        )
    rows = x.shape[1]
    try:
        layout = (
            counts
            if isinstance(counts, GroupedLayout)
            else GroupedLayout.from_masked(counts, rows, check=at_hand(counts))
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"batched_experts: {error}") from None
    if layout.counts.device != x.device:
        raise ValueError(f"batched_experts: counts is on {layout.counts.device}; x is on {x.device}")
    if layout.capacity != rows or len(layout) != len(x):
        raise ValueError(
            f"batched_experts: counts is of {len(layout)} experts and capacity {layout.capacity}; x has {len(x)} with "
            f"{rows} rows"
        )
    if out is not None and (out.shape != x.shape or not out.is_contiguous()):
        raise ValueError(f"batched_experts: out has shape {list(out.shape)}; it must be {list(x.shape)}, contiguous")
    expert = torch.arange(experts.num_experts, device=x.device).unsqueeze(1)
    ids = torch.where(torch.arange(rows, device=x.device) < layout.counts.unsqueeze(1), expert, -1)
    flat = None if out is None else out.flatten(0, 1)
    result = fused_experts(x.flatten(0, 1), experts, ids.reshape(-1, 1), out=flat, **options)
    return result.view(x.shape) if out is None else out
