"""Operands that end where their memory does: run as a script, since a stray read kills the process.

Every kernel of this machine computes cases whose operands end, or begin, at a page that may not be
touched. Prints each kernel and case before it runs.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import torch

import moekern
from moekern import ExpertWeights, GroupedWeights, NotSupported, ScaledTensor
from moekern.testing import cases, expert_cases, grouped_cases, routing_cases
from moekern.testing.cases import Gemm
from moekern.testing.expert_cases import FORMS, Experts
from moekern.testing.grouped_cases import KGrouped, MGrouped
from moekern.testing.routing_cases import Gate, Permute, Unpermute

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_PAGE = mmap.PAGESIZE
_kept: list[mmap.mmap] = []

CASES = [
    *(Gemm(m, n, k) for m in (1, 5, 20) for n, k in ((1, 1), (33, 127), (7, 130), (64, 256), (130, 300))),
    *(Gemm(m, 33, 300, a="e4m3fn", out="f32", c="f32", bias="bf16", block_b=(1, 128)) for m in (1, 5, 20)),
    *(Gemm(m, 33, 131, layout_a="columns", layout_b="columns") for m in (1, 20)),
    Gemm(3, 33, 131, a="e5m2", b="e4m3fnuz", scale="ue8m0"),
]

GROUPED = [
    *(MGrouped((1, 0, 20, 5), 33, 127, a=a, capacity=c, separate=s)
      for a in ("bf16", "e4m3fn") for c in (None, 20) for s in (False, True)),
    KGrouped((128, 0, 70), 33, 65),
    KGrouped((5,), 20, 31, a="bf16", alignment=1),
]  # fmt: skip


def fenced(x: torch.Tensor, at_end: bool) -> torch.Tensor:
    """A copy of x between two forbidden pages, touching the last or the first of them."""
    span = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    size = span * x.element_size() if x.numel() else 0
    pages = -(-max(size, 1) // _PAGE)
    memory = mmap.mmap(-1, (pages + 2) * _PAGE)
    _kept.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for fence in (start, start + (pages + 1) * _PAGE):
        if _libc.mprotect(fence, _PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = _PAGE + (pages * _PAGE - size if at_end else 0)
    whole = torch.frombuffer(memory, dtype=torch.uint8, offset=offset, count=max(size, 1))[:size].view(x.dtype)
    view = whole.as_strided(x.shape, x.stride())
    bits = torch.uint8 if x.element_size() == 1 else x.dtype
    view.view(bits).copy_(x.view(bits))
    return view


def fence(x: torch.Tensor | ScaledTensor | None, at_end: bool) -> torch.Tensor | ScaledTensor | None:
    if isinstance(x, ScaledTensor):
        return ScaledTensor(fenced(x.data, at_end), fenced(x.scale, at_end), x.block)
    return None if x is None else fenced(x, at_end)


def fence_weights(x: ScaledTensor | GroupedWeights, at_end: bool) -> ScaledTensor | GroupedWeights:
    if isinstance(x, GroupedWeights):
        return GroupedWeights([fence(x.group(g), at_end) for g in range(len(x))])
    return fence(x, at_end)


EXPERTS = [
    *(Experts(tokens, 130, 70, 3, 2, shared=1, bias="f32", form=form) for tokens in (1, 9) for form in FORMS),
    *(Experts(tokens, 300, 129, 3, 2, x="e4m3fn", out="f32") for tokens in (1, 40)),
    Experts(9, 127, 33, 3, 2, x="f32", quantize=True, routing="skips", index="i32"),
    Experts(9, 128, 64, 3, 2, reduce=False, layout_x="columns", layout_w="columns"),
]


def run_experts(device: moekern.Device) -> None:
    for case in EXPERTS:
        p = expert_cases.operands(case)
        for at_end in (True, False):
            experts, shared = (
                w and ExpertWeights.from_tensors([fenced(t, at_end) for t in w.tensors], w.layout)
                for w in (p.experts, p.options["shared"])
            )
            call = fence(p.x, at_end), experts, fenced(p.ids, at_end), fenced(p.weights, at_end)
            out = fenced(torch.zeros_like(expert_cases.output(case)), at_end)
            for kernel in moekern.fused_experts.kernels:
                if kernel.lacks(device):
                    continue
                print(kernel.name, case, "at the end" if at_end else "at the beginning", flush=True)
                options = {**p.options, "shared": shared}
                with moekern.use(kernel={"fused_experts": kernel.name}, num_threads=2):
                    prepared = moekern.fused_experts.prepare(*call, **options, out=out)
                    if kernel.refuses(*prepared) is None:
                        workspace = fenced(torch.zeros(kernel.workspace(*prepared), dtype=torch.uint8), at_end)
                        moekern.fused_experts(*call, **options, out=out, workspace=workspace)


ROUTING = [
    *(Gate(5, e, min(e, 8), logits=x, bias=x) for e in (1, 7, 33, 256) for x in ("f32", "bf16", "f16")),
    Gate(5, 66, 6, scoring="sigmoid", bias="f32", groups=3, kept=2, layout="columns", renormalize=True),
    *(
        Permute(5, h, 4, 2, x=x, alignment=4, index="i64", mapped=True)
        for h in (1, 33, 300)
        for x in ("bf16", "e4m3fn")
    ),
    *(Permute(5, h, 4, 2, x=x, format="e4m3fn", alignment=4) for h in (1, 33, 300) for x in ("f32", "f16", "bf16")),
    Permute(130, 9000, 4, 4, x="f32"),  # past the caches
    *(Unpermute(5, h, 3, 7, y=y, skips="some") for h in (1, 33, 300) for y in ("f32", "bf16", "f16")),
]


def fence_all(x: Any, at_end: bool) -> Any:
    """Every operand in x."""
    if isinstance(x, (torch.Tensor, ScaledTensor)):
        return fence(x, at_end)
    if isinstance(x, dict):
        return {name: fence_all(value, at_end) for name, value in x.items()}
    if isinstance(x, tuple):
        parts = [fence_all(part, at_end) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x


def routing_call(case: Gate | Permute | Unpermute) -> tuple[moekern.Op, tuple[Any, ...], dict[str, Any]]:
    if isinstance(case, Gate):
        call, options = routing_cases.gate_operands(case)
        return moekern.moe_gate, call, {**options, "out": routing_cases.gate_output(case)}
    if isinstance(case, Permute):
        call, options = routing_cases.permute_operands(case)
        return moekern.moe_permute, call, {**options, "out": routing_cases.permute_output(case, call[0])}
    return moekern.moe_unpermute, routing_cases.unpermute_operands(case), {"out": routing_cases.unpermute_output(case)}


def run_routing(device: moekern.Device) -> None:
    for case in ROUTING:
        for at_end in (True, False):
            op, *call = routing_call(case)
            arguments, options = (fence_all(x, at_end) for x in call)
            for kernel in op.kernels:
                if kernel.lacks(device):
                    continue
                print(op.name, kernel.name, case, "at the end" if at_end else "at the beginning", flush=True)
                with moekern.use(kernel={op.name: kernel.name}, num_threads=2):
                    op(*arguments, **options)


def main() -> None:
    assert sys.stdout is not None
    device = moekern.devices()[0]
    run_experts(device)
    run_routing(device)
    for case in CASES:
        p = cases.gemm_operands(case)
        for at_end in (True, False):
            a, b, c, bias = (fence(x, at_end) for x in (p.a, p.b, p.c, p.bias))
            out = fenced(torch.zeros(case.m, case.n, dtype=cases.gemm_out_dtype(case)), at_end)
            for kernel in moekern.fp8_gemm_nt.kernels:
                if kernel.lacks(device):
                    continue
                print(kernel.name, case, "at the end" if at_end else "at the beginning", flush=True)
                with moekern.use(kernel={"fp8_gemm_nt": kernel.name}, num_threads=2):
                    try:
                        moekern.fp8_gemm_nt(a, b, c, bias, out)
                    except NotSupported:
                        continue
    for case in GROUPED:
        for at_end in (True, False):
            if isinstance(case, KGrouped):
                a, b, layout, _, out = grouped_cases.k_grouped_operands(case)
                call = fence(a, at_end), fence(b, at_end), layout, None, fence(out, at_end)
            else:
                a, b, layout = grouped_cases.m_grouped_operands(case)
                out = grouped_cases.m_grouped_output(case, layout)
                call = fence(a, at_end), fence_weights(b, at_end), layout, fence(out, at_end)
            for kernel in case.op.kernels:
                if kernel.lacks(device):
                    continue
                print(case.op.name, kernel.name, case, "at the end" if at_end else "at the beginning", flush=True)
                with moekern.use(kernel={case.op.name: kernel.name}, num_threads=2):
                    try:
                        case.op(*call)
                    except NotSupported:
                        continue
    x = torch.randn(5, 300)
    for op in (moekern.per_token_cast_to_fp8, moekern.per_block_cast_to_fp8, moekern.per_channel_cast_to_fp8):
        for kernel in op.kernels:
            if kernel.lacks(device):
                continue
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                print(op.name, kernel.name, dtype, flush=True)
                with moekern.use(kernel={op.name: kernel.name}):
                    result = op(x.to(dtype))
                    out = ScaledTensor(fenced(result.data, True), fenced(result.scale, True), result.block)
                    op(fenced(x.to(dtype), True), out=out)
                with moekern.use(kernel={"dequantize": kernel.name}):
                    moekern.dequantize(out, fenced(x.to(dtype), True))
    print("done")


if __name__ == "__main__":
    main()
