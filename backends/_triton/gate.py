"""The experts of every token. One program takes a few rows: nothing is sorted, the largest are taken one by one."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from moekern.backends._triton.launch import Launch, cdiv, strides
from moekern.backends._triton.tiles import next_power_of_2
from moekern.ops.gate import SMALLEST_SUM

_LANES = 1024  # of a warp: three registers for each 32 of them, two of which are the key's
_MOST_ROWS = 16
_FASTER = 8 if triton.knobs.runtime.interpret else 1  # the interpreter's time goes by operations, whatever their size
_NONE = tl.constexpr(-(2**63))  # below the key of every number


@triton.jit
def exponential(x):
    """e^x within 4 ulp everywhere: Triton's own loses x 2^-24. 0 below 2^-126, infinite from e^88 on, NaN of NaN."""
    inside = (x >= -87.33654) & (x < 88.0)
    safe = tl.where(inside, x, 0.0)
    n = tl.floor(safe * 1.4426950408889634 + 0.5)
    rest = (safe - n * 0.693359375) + n * 2.12194440054690583e-4  # ln 2 in two parts: n times the first is exact
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    outside = tl.where(x > 0, float("inf"), tl.where(x == x, 0.0, x))
    return tl.where(inside, tl.exp(rest) * power, outside)


@triton.jit
def ordered(x):
    """Integers in the order of the numbers: zeros of both signs are equal, NaN of both signs is above all."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    key = tl.where(bits < 0, -magnitude, magnitude)
    return tl.where(magnitude > 0x7F800000, 0x7FFFFFFF, key)


@triton.jit
def number(key):
    """What `ordered` made of it, but for the sign of a zero or a NaN."""
    bits = tl.where(key < 0, (-key).to(tl.uint32, bitcast=True) | 0x80000000, key.to(tl.uint32, bitcast=True))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def keyed(value, place, PLACES: tl.constexpr):
    """Integers in the order of the values, and of equal values the lowest place first. No two of a row are equal."""
    return (ordered(value).to(tl.int64) << 32) | (PLACES - 1 - place)


@triton.jit
def gate_kernel(
    logits, bias, weights, ids, tokens, topk, kept, factor, mask_value,
    logits_row, logits_column, bias_step, weights_row, weights_column, ids_row, ids_column,
    SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr, LEAST: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr,
    MASKED: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """COUNT groups of SIZE experts lie in GROUPS x WIDTH lanes, powers of two, in their order."""
    LANES: tl.constexpr = GROUPS * WIDTH
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = (t < tokens)[:, None]
    row = t.to(tl.int64)[:, None]
    lane = tl.arange(0, LANES)
    # where lanes are experts, the compiler has to see that loads are contiguous
    expert = lane if GROUPS == 1 or WIDTH == SIZE else lane // WIDTH * SIZE + lane % WIDTH
    exists = ((lane % WIDTH < SIZE) & (lane < COUNT * WIDTH))[None, :]
    at = expert.to(tl.int64)[None, :]

    x = tl.load(logits + row * logits_row + at * logits_column, mask=there & exists, other=-float("inf"))
    x = x.to(tl.float32)
    if SIGMOID:
        scores = tl.div_rn(1.0, 1.0 + exponential(0.0 - x))
    else:  # NaN and infinities make the sum NaN, and with it the row
        e = tl.where(exists, exponential(x - tl.max(x, 1)[:, None]), 0.0)
        scores = tl.div_rn(e, tl.broadcast_to(tl.sum(e, 1)[:, None], e.shape))
    selection = scores
    if bias is not None:
        selection += tl.load(bias + at * bias_step, mask=exists, other=0.0).to(tl.float32)
    keys = tl.where(exists, keyed(selection, lane[None, :], LANES), _NONE)

    if MASKED:
        grouped = tl.reshape(keys, (ROWS, GROUPS, WIDTH))
        first = tl.max(grouped, 2)
        value = number((first >> 32).to(tl.int32))
        if bias is not None:
            second = tl.max(tl.where(grouped == first[:, :, None], _NONE, grouped), 2)
            value += number((second >> 32).to(tl.int32))
        group = tl.arange(0, GROUPS)[None, :]
        order = tl.where(group < COUNT, keyed(value, group, GROUPS), _NONE)
        for _ in range(kept):
            order = tl.where(order == tl.max(order, 1)[:, None], _NONE, order)
        left_out = tl.broadcast_to((order != _NONE)[:, :, None], grouped.shape)
        left_out = tl.reshape(left_out, keys.shape) & exists
        mask = tl.full((1, 1), mask_value, tl.float32)
        keys = tl.where(left_out, keyed(mask, lane[None, :], LANES), keys)

    slot = tl.arange(0, SLOTS)[None, :]
    chosen = tl.zeros((ROWS, SLOTS), tl.int32)
    for j in range(topk):
        best = tl.max(keys, 1)[:, None]
        keys = tl.where(keys == best, _NONE, keys)
        chosen = tl.where(slot == j, LANES - 1 - (best & (LANES - 1)).to(tl.int32), chosen)

    taken = slot < topk
    w = tl.where(taken, tl.gather(scores, chosen, 1), 0.0)
    if RENORMALIZE:
        w = tl.div_rn(w, tl.broadcast_to(tl.sum(w, 1)[:, None] + LEAST, w.shape))
    if GROUPS > 1 and WIDTH != SIZE:
        chosen = chosen // WIDTH * SIZE + chosen % WIDTH
    slot = slot.to(tl.int64)
    tl.store(weights + row * weights_row + slot * weights_column, w * factor, mask=there & taken)
    tl.store(ids + row * ids_row + slot * ids_column, chosen, mask=there & taken)


def gate(
    logits: torch.Tensor, topk: int, scoring: str, correction_bias: torch.Tensor | None, num_expert_group: int,
    topk_group: int, renormalize: bool, routed_scaling_factor: float, mask_value: float, out: Any,
) -> list[Launch]:  # fmt: skip
    """Of a prepared call."""
    tokens, experts = logits.shape
    masked = topk_group < num_expert_group
    count = num_expert_group if masked else 1
    size = experts // count
    groups, width = next_power_of_2(count), next_power_of_2(size)
    lanes = groups * width
    rows = max(min(_LANES // lanes, _MOST_ROWS), 1) * _FASTER
    return [
        Launch(
            gate_kernel,
            (cdiv(tokens, rows),),
            {
                "logits": logits,
                "bias": correction_bias,
                "weights": out[0],
                "ids": out[1],
                "tokens": tokens,
                "topk": topk,
                "kept": topk_group,
                "factor": float(routed_scaling_factor),
                "mask_value": float(mask_value),
                **strides("logits", logits),
                "bias_step": 0 if correction_bias is None else correction_bias.stride(0),
                **strides("weights", out[0]),
                **strides("ids", out[1]),
            },
            {
                "SIGMOID": scoring == "sigmoid",
                "RENORMALIZE": renormalize,
                "LEAST": SMALLEST_SUM,
                "COUNT": count,
                "SIZE": size,
                "MASKED": masked,
                "ROWS": rows,
                "GROUPS": groups,
                "WIDTH": width,
                "SLOTS": next_power_of_2(topk),
            },
            num_warps=max(lanes // _LANES, 1),
        )
    ]
