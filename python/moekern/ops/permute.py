"""moe_permute and moe_unpermute: tokens to their experts' rows, and back. Next: op.py, then backends/<device>/."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from moekern import _C
from moekern.layout import GroupedLayout
from moekern.op import op
from moekern.ops.arguments import check_bool, check_integer
from moekern.ops.quantize import reference_cast
from moekern.scaled import BLOCK, ScaledTensor, as_scaled, as_tensor

Rows = Any  # ScaledTensor, (data, scale), or a float tensor


class Permuted(NamedTuple):
    """Rows in the order of their experts."""

    x: Any  # [rows, hidden], like the x that was permuted
    layout: Any  # GroupedLayout: the rows of every expert. In an `out` it is not looked at
    inverse: torch.Tensor  # [tokens, topk] int32: the row of every slot, -1 where it was dropped


def permuted_rows(tokens: Any, topk: Any, num_experts: int, alignment: int = 1) -> Any:
    """The rows that `moe_permute` allocates: the most that any ids can take.

    tokens * topk with alignment 1. Otherwise every expert that has a token is padded by up to alignment - 1 rows.
    """
    check_integer("permuted_rows", "num_experts", num_experts, 0)
    check_integer("permuted_rows", "alignment", alignment, 1)
    slots = tokens * topk
    return (slots + torch.sym_min(num_experts, slots) * (alignment - 1)) // alignment * alignment


def _prepare_permute(
    x: Rows,
    ids: torch.Tensor,
    num_experts: int,
    *,
    alignment: int = 1,
    expert_map: torch.Tensor | None = None,
    format: str | None = None,
    round_scale_up: bool = False,
    out: Permuted | None = None,
) -> tuple[Any, ...]:
    name = "moe_permute"
    x = as_scaled(x, f"{name}: x") if isinstance(x, (ScaledTensor, tuple, list)) else as_tensor(x, f"{name}: x")
    ids = as_tensor(ids, f"{name}: ids")
    if expert_map is not None:
        expert_map = as_tensor(expert_map, f"{name}: expert_map")
    check_integer(name, "num_experts", num_experts, 0)
    check_integer(name, "alignment", alignment, 1)
    check_bool(name, "round_scale_up", round_scale_up)
    if round_scale_up and format is None:
        raise ValueError(f"{name}: round_scale_up is True, but format is None: nothing is cast")
    if ids.dim() != 2:
        raise ValueError(f"{name}: ids has {ids.dim()} dimensions; it must have 2")
    if out is not None and not (isinstance(out, tuple) and len(out) == 3):
        raise TypeError(f"{name}: out is a {type(out).__name__}; it must be a Permuted")
    rows = permuted_rows(ids.shape[0], ids.shape[1], num_experts, alignment)
    moved, inverse, starts, counts = _C.prepare_permute(x, ids, num_experts, alignment, expert_map, format, rows, out)
    layout = GroupedLayout.unfilled(starts, counts, moved.shape[0], alignment)
    return x, ids, num_experts, alignment, expert_map, format, round_scale_up, Permuted(moved, layout, inverse)


@op(prepare=_prepare_permute)
def moe_permute(
    x: Rows,
    ids: torch.Tensor,
    num_experts: int,
    *,
    alignment: int = 1,
    expert_map: torch.Tensor | None = None,
    format: str | None = None,
    round_scale_up: bool = False,
    out: Permuted | None = None,
) -> Permuted:
    """Gather the rows of every expert's tokens, expert after expert.

    result.x[result.inverse[t, j]] = x[t] for every slot j of every token t
    with a format: = per_token_cast_to_fp8(x, format, round_scale_up)[t], to the bit
    result.layout: expert g has counts[g] rows from starts[g] on, a multiple of `alignment`

    x: [T, H] float32, float16 or bfloat16; or FP8 with one row of scales a token, as ScaledTensor or
        (data, scale): the scales move with their rows.
    ids: [T, topk] int32 or int64, expert ids. A slot of -1 is dropped. An expert may occur more than once in
        a row: each slot has its own row.
    num_experts: the experts of the result.
    alignment: every expert's rows begin at a multiple of it (DeepGEMM's contiguous layout: 128).
    expert_map: [E] int32 or int64, for ids of E experts of which some live elsewhere: the expert here, 0 to
        num_experts - 1, or -1, which drops the slot.
    format: of FP8, for a float x that is cast on its way: result.x is a ScaledTensor of blocks (1, 128). A row is read
        and cast once, and written to all its places: of bfloat16 with topk 8, 2 + 8 bytes an element are moved, where
        a cast ahead, which Triton's kernels make of it, moves 2 + 1 and 1 + 8.
    round_scale_up: as in `per_token_cast_to_fp8`, with a format.
    out: a Permuted whose x and inverse are written to. x may have any number of rows that suffices;
        `permuted_rows` says how many always do, and an accelerator takes no fewer. Its layout is not looked at: the
        result has its own.

    Rows of an expert keep the order of the tokens, and of the slots within a token. The rows between an expert's last
    and the next multiple of `alignment` are zero, scales too. The rows behind the last expert's, of which there are
    some where slots are dropped or alignment is not 1, are not written to.

    A float x has a gradient unless it is cast. Raises ValueError or TypeError naming the argument; what ids and
    expert_map hold is checked before anything is moved. On an accelerator it is not looked at: what names no expert
    counts as -1.
    """
    local = ids.long() if expert_map is None else _mapped(ids.long(), expert_map.long())
    inverse = torch.full(ids.shape, -1, dtype=torch.int32)
    counts, end = [], 0
    for expert in range(num_experts):
        slots = (local == expert).nonzero()  # token by token, slot by slot
        counts.append(len(slots))
        inverse[slots[:, 0], slots[:, 1]] = torch.arange(end, end + len(slots), dtype=torch.int32)
        end += -(-len(slots) // alignment) * alignment
    layout = GroupedLayout.from_counts(
        counts, alignment, permuted_rows(ids.shape[0], ids.shape[1], num_experts, alignment)
    )
    if format is not None:
        x = reference_cast(x, (1, BLOCK), format, round_scale_up)
    if isinstance(x, ScaledTensor):
        moved: Any = ScaledTensor(_gather(x.data, inverse, layout), _gather(x.scale, inverse, layout), x.block)
    else:
        moved = _gather(x, inverse, layout)
    return Permuted(moved, layout, inverse)


def _mapped(ids: torch.Tensor, expert_map: torch.Tensor) -> torch.Tensor:
    known = torch.cat([expert_map, expert_map.new_full((1,), -1)])  # id -1 takes the last
    return known[ids]


def _gather(x: torch.Tensor, inverse: torch.Tensor, layout: GroupedLayout) -> torch.Tensor:
    """x[t] at row inverse[t, j]; zero elsewhere."""
    bits = x.view(torch.uint8) if x.element_size() == 1 else x
    moved = bits.new_zeros(layout.rows, x.shape[1])
    tokens, slots = (inverse >= 0).nonzero(as_tuple=True)
    moved[inverse[tokens, slots].long()] = bits[tokens]
    return moved.view(x.dtype)


def _prepare_unpermute(
    y: torch.Tensor,
    inverse: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Any, ...]:
    name = "moe_unpermute"
    y, inverse = as_tensor(y, f"{name}: y"), as_tensor(inverse, f"{name}: inverse")
    if weights is not None:
        weights = as_tensor(weights, f"{name}: weights")
    out = _C.prepare_unpermute(y, inverse, weights, out, out_dtype)
    return y, inverse, weights, out, out_dtype


@op(prepare=_prepare_unpermute)
def moe_unpermute(
    y: torch.Tensor,
    inverse: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Bring the experts' rows back to their tokens and add them up.

    out[t] = cast(sum_j weights[t, j] * y[inverse[t, j]]), j in ascending order, slots of -1 left out

    y: [R, H] float32, float16 or bfloat16.
    inverse: [T, topk] int32 or int64, rows of y or -1: `moe_permute`'s.
    weights: [T, topk] of a float dtype, or None: all are 1.
    out: [T, H] to write to, or None to allocate.
    out_dtype: torch.bfloat16, float16 or float32; of `out` if given, else of `y`.

    Every product and every partial sum is rounded to float32, in that order: the same bits on every kernel and
    whatever the number of threads. A slot of -1 takes no part even where its weight is NaN; a token without slots
    is zero. y and weights have gradients.

    Raises ValueError or TypeError naming the argument; what inverse holds is checked before anything is read.
    On an accelerator it is not looked at: what names no row of y counts as -1.
    """
    sums = torch.zeros(inverse.shape[0], y.shape[1], dtype=torch.float64)
    for token, rows in enumerate(inverse.tolist()):
        slots = [slot for slot, row in enumerate(rows) if row >= 0]
        factors = [1.0 if weights is None else weights[token, slot].to(torch.float64) for slot in slots]
        terms = [factor * y[rows[slot]].to(torch.float64) for factor, slot in zip(factors, slots, strict=True)]
        for i, term in enumerate(terms):
            sums[token] = sums[token] + term if i else term  # of zeros alone, -0 stays -0
    return sums
