"""moe_gate: the experts of every token, and their weights. Next: op.py, then backends/<device>/."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from moekern import _C
from moekern.op import op
from moekern.ops.arguments import check_bool, check_choice, check_integer, check_number
from moekern.scaled import as_tensor

SCORING = ("softmax", "sigmoid")
SMALLEST_SUM = 1e-20  # transformers' addend: weights of a row whose scores are all 0 are 0, not NaN


class Routing(NamedTuple):
    """The experts of every token, best first. Unpacks like the pair that other libraries return."""

    weights: torch.Tensor  # [tokens, topk] float32
    ids: torch.Tensor  # [tokens, topk] int32


def _prepare(
    logits: torch.Tensor,
    topk: int,
    *,
    scoring: str = "softmax",
    correction_bias: torch.Tensor | None = None,
    num_expert_group: int = 1,
    topk_group: int = 1,
    renormalize: bool = False,
    routed_scaling_factor: float = 1.0,
    mask_value: float = -math.inf,
    out: Routing | None = None,
) -> tuple[Any, ...]:
    name = "moe_gate"
    logits = as_tensor(logits, f"{name}: logits")
    check_choice(name, "scoring", scoring, SCORING)
    check_bool(name, "renormalize", renormalize)
    for what, count in (("topk", topk), ("num_expert_group", num_expert_group), ("topk_group", topk_group)):
        check_integer(name, what, count, 1)
    for what, number in (("routed_scaling_factor", routed_scaling_factor), ("mask_value", mask_value)):
        check_number(name, what, number)
    if correction_bias is not None:
        correction_bias = as_tensor(correction_bias, f"{name}: correction_bias")
    if out is not None and not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(f"{name}: out is a {type(out).__name__}; it must be a Routing, or a (weights, ids) pair")
    out = Routing(
        *_C.prepare_gate(
            logits, topk, scoring == "sigmoid", correction_bias, num_expert_group, topk_group, routed_scaling_factor,
            mask_value, out,
        )
    )  # fmt: skip
    return (
        logits, topk, scoring, correction_bias, num_expert_group, topk_group, renormalize, routed_scaling_factor,
        mask_value, out,
    )  # fmt: skip


@op(prepare=_prepare)
def moe_gate(
    logits: torch.Tensor,
    topk: int,
    *,
    scoring: str = "softmax",
    correction_bias: torch.Tensor | None = None,
    num_expert_group: int = 1,
    topk_group: int = 1,
    renormalize: bool = False,
    routed_scaling_factor: float = 1.0,
    mask_value: float = -math.inf,
    out: Routing | None = None,
) -> Routing:
    """The topk experts of every token, and their weights.

    scores[t, e] = softmax_e(logits[t])  or  sigmoid(logits[t, e])
    selection = scores + correction_bias
    Of num_expert_group groups of neighbouring experts, the topk_group best keep their selection values; a group
    counts by the sum of its two largest if there is a correction_bias, else by its largest. All other
    experts' become mask_value.
    ids[t] = the experts of the topk largest selection values, in descending order
    weights[t, j] = scores[t, ids[t, j]], / (their sum + 1e-20) if renormalize, * routed_scaling_factor

    logits: [T, E] float32, float16 or bfloat16. E is at most 1024.
    topk: at most 32.
    scoring: "softmax" or "sigmoid".
    correction_bias: [E] of a float dtype, or None. It takes part in the selection, not in the weights.
    num_expert_group: divides E. topk_group: of them. Without mask_value 0, topk experts must remain.
    mask_value: -inf (DeepSeek's own code), or 0 (transformers, vllm-ascend). They differ where selection values are
        negative: 0 then prefers an expert of a group that was left out.
    out: a Routing to write to: float32 weights and int32 ids, both [T, topk].

    Equal selection values, and equal groups, go to the lowest index. Scores are float32: those below 2^-126 may
    be 0, and what differs by less than their last bits may change places. NaN counts as larger than any number,
    so it shows in the weights; a softmax with a NaN or an infinity in its row is NaN throughout. ids are always
    valid and distinct. Two calls give the same bits whatever the number of threads.

    Logits have a gradient; correction_bias, which is updated by other means, has none.

    Raises ValueError or TypeError naming the argument.
    Method: DeepSeek-V3 (arXiv:2412.19437, section 2.1.2: noaux_tc) and DeepSeek-V2 (arXiv:2405.04434, section 2.2.2).
    """
    logits = logits.to(torch.float64)
    scores = torch.softmax(logits, dim=1) if scoring == "softmax" else torch.sigmoid(logits)
    selection = scores if correction_bias is None else scores + correction_bias.to(torch.float64)
    tokens, experts = scores.shape
    grouped = selection.reshape(tokens, num_expert_group, experts // num_expert_group)
    if topk_group < num_expert_group:
        best = grouped.sort(dim=2, descending=True).values
        groups = best[:, :, 0] if correction_bias is None else best[:, :, 0] + best[:, :, 1]
        order = groups.sort(dim=1, descending=True, stable=True).indices
        grouped = grouped.clone()
        grouped[torch.arange(tokens).unsqueeze(1), order[:, topk_group:]] = mask_value
    order = grouped.reshape(tokens, experts).sort(dim=1, descending=True, stable=True).indices
    ids = order[:, :topk]
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(dim=1, keepdim=True) + SMALLEST_SUM)
    return Routing((weights * routed_scaling_factor).to(torch.float32), ids.to(torch.int32))
