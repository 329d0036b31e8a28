"""vLLM's names and argument order for routing: `import moekern.compat.vllm as vllm_moe`.

The functions of vllm.model_executor.layers.fused_moe that need no vLLM. Indices that are undefined there
are defined here; where it asserts, a ValueError or TypeError names the argument.
"""

from __future__ import annotations

from typing import Any

import torch

import moekern
from moekern.ops.arguments import check_integer

__all__ = ["fused_topk", "grouped_topk", "moe_align_block_size", "moe_permute", "moe_unpermute"]


def fused_topk(
    hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weights [T, topk] float32, ids [T, topk] int32, token_expert_indices) of the softmax of gating_output [T, E].

    token_expert_indices[t, j] = j T + t, as there: where slot j of token t lies slot by slot.
    """
    _check_tokens("fused_topk", hidden_states, gating_output)
    weights, ids = moekern.moe_gate(gating_output, topk, renormalize=renormalize)
    slots = torch.arange(ids.numel(), dtype=torch.int32, device=ids.device)
    return weights, ids, slots.view(topk, -1).T.contiguous()


def grouped_topk(
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
    num_expert_group: int = 1,
    topk_group: int = 1,
    scoring_func: str = "softmax",
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights [T, topk] float32, ids [T, topk] int32): `moekern.moe_gate`."""
    _check_tokens("grouped_topk", hidden_states, gating_output)
    return moekern.moe_gate(
        gating_output,
        topk,
        scoring=scoring_func,
        correction_bias=e_score_correction_bias,
        num_expert_group=num_expert_group,
        topk_group=topk_group,
        renormalize=renormalize,
        routed_scaling_factor=routed_scaling_factor,
    )


def moe_align_block_size(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sorted_token_ids, expert_ids, num_tokens_post_pad): slots in the order of their experts, in whole blocks.

    sorted_token_ids: int32, as many as any n = T topk ids may take: n + num_experts (block_size - 1), rounded up
        to whole blocks with pad_sorted_ids, or n block_size where that is less and n < num_experts. Slot j of token t
        is t topk + j; n is padding. Each expert's slots begin a block, in the order of the tokens.
    expert_ids: int32, one a block: the expert; with expert_map the expert here, or -1. -1 behind the last block.
    num_tokens_post_pad: [1] int32, the slots with their padding.

    topk_ids: [T, topk] int32 or int64, of num_experts experts; -1 is left out.
    expert_map: [num_experts], of experts of which some live elsewhere: blocks of expert -1, or left out with
        ignore_invalid_experts.
    """
    check_integer("moe_align_block_size", "block_size", block_size, 1)
    if expert_map is not None and expert_map.shape != (num_experts,):
        raise ValueError(
            f"moe_align_block_size: expert_map has shape {list(expert_map.shape)}; num_experts is {num_experts}"
        )
    slots, device = topk_ids.numel(), topk_ids.device
    experts = torch.arange(num_experts, device=device) if expert_map is None else expert_map
    experts = torch.cat([experts.to(torch.int32), experts.new_full((1,), -1, dtype=torch.int32)])  # the last: of none
    if expert_map is not None and ignore_invalid_experts:
        known = (topk_ids >= 0) & (topk_ids < num_experts)  # others are moe_permute's to refuse
        here = experts[topk_ids.long().clamp(-1, num_experts)]
        topk_ids = torch.where(known & (here < 0), -1, topk_ids)
    nothing = torch.empty((topk_ids.shape[0], 0), device=device)
    _, layout, inverse = moekern.moe_permute(nothing, topk_ids, num_experts, alignment=block_size)
    length = slots + num_experts * (block_size - 1)
    if pad_sorted_ids:
        length = -(-length // block_size) * block_size
    if slots < num_experts:
        length = min(slots * block_size, length)
    blocks = (layout.counts + block_size - 1) // block_size
    block = torch.arange(-(-length // block_size), device=device)
    expert_ids = experts[torch.searchsorted(blocks.cumsum(0), block, right=True)]
    return _slot_of_every_row(inverse, length), expert_ids, (blocks.sum() * block_size).to(torch.int32).reshape(1)


def moe_permute(
    hidden_states: torch.Tensor,
    a1q_scale: torch.Tensor | None,
    topk_ids: torch.Tensor,
    n_expert: int,
    n_local_expert: int = -1,
    expert_map: torch.Tensor | None = None,
    permuted_hidden_states: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows, their scales or None, expert_first_token_offset, inv_permuted_idx, permuted_idx).

    rows: [T topk, H] like hidden_states, written to permuted_hidden_states if given. With a1q_scale, one row of
        scales a token.
    expert_first_token_offset: [n_local_expert + 1] int64, where each expert's rows begin, and the last ones end.
    inv_permuted_idx: [T topk] int32, the row of every slot; -1 where its expert lives elsewhere.
    permuted_idx: [T topk] int32, the slot of every row; T topk where there is none.
    """
    experts = n_expert if n_local_expert == -1 else n_local_expert
    if expert_map is None and experts != n_expert:
        raise ValueError(f"moe_permute: n_local_expert is {experts} of {n_expert}; an expert_map has to say which")
    x = hidden_states if a1q_scale is None else moekern.ScaledTensor(hidden_states, a1q_scale)
    out = None
    if permuted_hidden_states is not None:
        moved: Any = permuted_hidden_states
        if isinstance(x, moekern.ScaledTensor):
            scales = x.scale.new_empty((len(permuted_hidden_states), x.scale.shape[1]))
            moved = moekern.ScaledTensor(permuted_hidden_states, scales, x.block)
        out = moekern.Permuted(moved, None, torch.empty_like(topk_ids, dtype=torch.int32))
    rows, layout, inverse = moekern.moe_permute(x, topk_ids, experts, expert_map=expert_map, out=out)
    data, scale = (rows, None) if a1q_scale is None else rows
    offsets = torch.cat([layout.starts, layout.counts.sum().reshape(1)])
    return data, scale, offsets, inverse.flatten(), _slot_of_every_row(inverse, inverse.numel())


def moe_unpermute(
    out: torch.Tensor,
    permuted_hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    inv_permuted_idx: torch.Tensor,
    expert_first_token_offset: torch.Tensor | None = None,
) -> None:
    """out [T, H] = the rows of each token's slots times topk_weights [T, topk], added up: `moekern.moe_unpermute`.

    inv_permuted_idx says where those rows are; expert_first_token_offset is accepted and changes nothing.
    """
    inverse = inv_permuted_idx.view(topk_weights.shape)
    moekern.moe_unpermute(permuted_hidden_states, inverse, topk_weights, out=out)


def _slot_of_every_row(inverse: torch.Tensor, rows: int) -> torch.Tensor:
    """The slot that each row comes from; as many as there are slots where it comes from none."""
    slots = inverse.numel()
    sources = torch.full((rows + 1,), slots, dtype=torch.int32, device=inverse.device)  # the last: of slots without row
    row = torch.where(inverse < 0, rows, inverse).flatten().long()
    sources[row] = torch.arange(slots, dtype=torch.int32, device=inverse.device)
    return sources[:rows]


def _check_tokens(name: str, hidden_states: torch.Tensor, gating_output: torch.Tensor) -> None:
    if hidden_states.shape[0] != gating_output.shape[0]:
        raise ValueError(
            f"{name}: hidden_states has {hidden_states.shape[0]} rows, gating_output {gating_output.shape[0]}; both "
            "have one a token"
        )
