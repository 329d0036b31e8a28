"""`python -m moekern selftest`: small problems for every kernel of every op, checked bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

import moekern
from moekern import ops
from moekern.layout import GroupedLayout
from moekern.op import Kernel, Op
from moekern.scaled import FORMATS, ScaledTensor
from moekern.testing import cases, expert_cases, grouped_cases, routing_cases
from moekern.testing.moving import Mover, devices


def main() -> int:
    """Prints a line for every kernel; returns 1 if one failed, else 0."""
    counts = {"ok": 0, "FAILED": 0, "absent": 0}
    for op in ops.OPS:
        problems = [(arguments, _by_name(op.reference, arguments)) for arguments in _PROBLEMS[op.name]()]
        for kernel in op.kernels:
            state, why = _check(op, kernel, problems)
            counts[state] += 1
            print(f"{state:<7} {op.name:<32} {kernel.name}{': ' + why if why else ''}")
    print(f"{counts['ok']} passed, {counts['FAILED']} failed, {counts['absent']} cannot run here")
    return 1 if counts["FAILED"] or not counts["ok"] else 0


def _check(op: Op, kernel: Kernel, problems: list[tuple[tuple[Any, ...], Any]]) -> tuple[str, str | None]:
    if reason := kernel.absent(moekern.devices()):
        return "absent", reason
    where = next(where for where, device in devices() if kernel.lacks(device) is None)
    taken = 0
    for arguments, expected in problems:
        there = Mover(where)
        try:
            call = _by_name(op.prepare, there(arguments))
            if kernel.refuses is not None and kernel.refuses(*call) is not None:
                continue
            taken += 1
            kernel.run(*call)
            wrong = _difference(there.back(call[op.output_index]), expected)
        except Exception as error:  # one broken kernel does not hide the others
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            return "FAILED", wrong
    return ("ok", None) if taken else ("FAILED", "took none of the problems")


def _by_name(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Called with arguments of which a dict, the last, holds those that are given by name."""
    named = arguments[-1] if isinstance(arguments[-1], dict) else {}
    return function(*(arguments[:-1] if named else arguments), **named)


def _difference(got: Any, expected: Any) -> str | None:
    if isinstance(got, tuple):
        return next((wrong for pair in zip(got, expected, strict=True) if (wrong := _difference(*pair))), None)
    if isinstance(got, GroupedLayout):
        return _difference((got.starts, got.counts), (expected.starts, expected.counts))
    if isinstance(got, ScaledTensor) and isinstance(expected, ScaledTensor):
        return _differing_bytes(got.data, expected.data) or _differing_bytes(got.scale, expected.scale)
    assert isinstance(got, torch.Tensor) and isinstance(expected, torch.Tensor)
    return _differing_bytes(got, expected.to(torch.float32).to(got.dtype))


def _differing_bytes(got: torch.Tensor, expected: torch.Tensor) -> str | None:
    wrong = (got.view(torch.uint8) != expected.contiguous().view(torch.uint8)).view(*got.shape, -1).any(-1)
    if not wrong.any():
        return None
    at = tuple(wrong.nonzero()[0].tolist())
    count = f"{int(wrong.sum())} of {wrong.numel()} elements differ"
    return f"{count}; {list(at)} is {got[at]}, not {expected[at]}"


def _gemm() -> Iterator[tuple[Any, ...]]:
    """Few rows for the streaming kernels, many for the packed ones; ragged in every direction."""
    for m in (1, 7, 19):
        for a in ("bf16", "e4m3fn"):
            case = cases.Gemm(m, 161, 300, a=a, bias="f32", c="f32", values="integers")
            operands = cases.gemm_operands(case)
            yield operands.a, operands.b, operands.c, operands.bias


def _m_grouped(capacity: int | None) -> Callable[[], Iterator[tuple[Any, ...]]]:
    """Groups of few rows, of many and of none; weights in one tensor and in many; rows of no group."""

    def problems() -> Iterator[tuple[Any, ...]]:
        for a in ("bf16", "e4m3fn"):
            for separate in (False, True):
                case = grouped_cases.MGrouped(
                    (2, 0, 19, 7), 161, 300, a=a, capacity=capacity, alignment=16, separate=separate, values="integers"
                )
                yield grouped_cases.m_grouped_operands(case)

    return problems


def _k_grouped() -> Iterator[tuple[Any, ...]]:
    for a in ("f32", "bf16", "e4m3fn"):
        case = grouped_cases.KGrouped((128, 0, 70), 33, 65, a=a, c="f32", values="integers")
        yield grouped_cases.k_grouped_operands(case)[:4]


def _cast(op: str) -> Callable[[], Iterator[tuple[Any, ...]]]:
    def problems() -> Iterator[tuple[Any, ...]]:
        for format in FORMATS.values():
            for round_scale_up in (False, True):
                yield cases.cast_input(cases.Cast(op, 131, 267, x="f32")), format, round_scale_up

    return problems


def _silu_mul() -> Iterator[tuple[Any, ...]]:
    """silu(128) is 128 in f32, silu(0) is 0 and silu(-128) rounds to code 0: no approximation of exp shows."""
    g = torch.Generator().manual_seed(0)
    gate = 128.0 * torch.randint(-1, 2, (19, 267), generator=g)
    up = torch.randint(-8, 9, (19, 267), generator=g).float()
    for format in FORMATS.values():
        yield torch.cat((gate, up), 1), format, False


def _dequantize() -> Iterator[tuple[Any, ...]]:
    for format in FORMATS.values():
        yield (cases.dequantize_input(cases.Dequantize(19, 141, format)),)


def _experts() -> Iterator[tuple[Any, ...]]:
    """One or two kinds of activations for every kernel, gate and up in every form; ragged in every direction."""
    for x in ("bf16", "e4m3fn"):
        for form in expert_cases.FORMS:
            case = expert_cases.Experts(19, 300, 200, 5, 2, x=x, form=form, routing="skips", values="integers")
            yield expert_cases.operands(case).arguments


def _gate() -> Iterator[tuple[Any, ...]]:
    """Scores of 1/2 and 1/64 and biases of eighths: selection values are exact, and many are equal."""
    for mask in (-math.inf, 0.0):
        case = routing_cases.Gate(
            19, 160, 8, scoring="sigmoid", bias="f32", groups=8, kept=3, mask=mask, renormalize=True, factor=2.0,
            values="ties",
        )  # fmt: skip
        arguments, options = routing_cases.gate_operands(case)
        yield *arguments, options
    yield torch.zeros(5, 64), 20, {"num_expert_group": 4, "topk_group": 2}


def _permute() -> Iterator[tuple[Any, ...]]:
    """5, 1, 9, 1 and 5 slots for the experts: with an alignment of 4 they take all rows that any 21 slots can."""
    ids = torch.tensor([0, 2, 4] * 5 + [2, 1, 2, 3, 2, 2]).view(7, 3)
    for x, format in (("bf16", None), ("bf16", "e4m3fn"), ("e4m3fn", None)):
        (rows, *_), _ = routing_cases.permute_operands(routing_cases.Permute(7, 300, 5, 3, x=x))
        for alignment in (1, 4):
            yield rows, ids, 5, {"alignment": alignment, "format": format}


def _unpermute() -> Iterator[tuple[Any, ...]]:
    for y in cases.FLOATS:
        case = routing_cases.Unpermute(19, 267, 4, 40, y=y, skips="some", values="integers")
        yield routing_cases.unpermute_operands(case)


_PROBLEMS: dict[str, Callable[[], Iterator[tuple[Any, ...]]]] = {
    "fp8_gemm_nt": _gemm,
    "m_grouped_fp8_gemm_nt_contiguous": _m_grouped(None),
    "m_grouped_fp8_gemm_nt_masked": _m_grouped(20),
    "k_grouped_fp8_gemm_tn_contiguous": _k_grouped,
    "per_token_cast_to_fp8": _cast("per_token_cast_to_fp8"),
    "per_block_cast_to_fp8": _cast("per_block_cast_to_fp8"),
    "per_channel_cast_to_fp8": _cast("per_channel_cast_to_fp8"),
    "silu_mul_cast_to_fp8": _silu_mul,
    "dequantize": _dequantize,
    "fused_experts": _experts,
    "moe_gate": _gate,
    "moe_permute": _permute,
    "moe_unpermute": _unpermute,
}
