"""CPUs: native kernels from kernels.inc, chosen by the features found at run time."""

from __future__ import annotations

import platform
from typing import Any

from moekern import _C
from moekern.op import Device, Kernel
from moekern.ops import (
    dequantize,
    fp8_gemm_nt,
    fused_experts,
    k_grouped_fp8_gemm_tn_contiguous,
    m_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nt_masked,
    moe_gate,
    moe_permute,
    moe_unpermute,
    per_block_cast_to_fp8,
    per_channel_cast_to_fp8,
    per_token_cast_to_fp8,
    silu_mul_cast_to_fp8,
)

_NATIVE = _C.native["cpu"]


def probe() -> list[Device]:
    arch = platform.machine().lower().replace("amd64", "x86_64")
    return [Device("cpu", arch, _NATIVE["features"](), name=platform.processor() or arch)]


def torch_devices(device: Device) -> list[str]:
    return ["cpu"]


def _cast(native: Any) -> Any:
    def run(x: Any, format: str, round_scale_up: bool, out: Any) -> None:
        native(x, out, round_scale_up)

    return run


def _dequantize(native: Any) -> Any:
    def run(x: Any, out: Any, out_dtype: Any) -> None:
        native(x, out)

    return run


def _gate(native: Any) -> Any:
    def run(
        logits: Any,
        topk: int,
        scoring: str,
        correction_bias: Any,
        num_expert_group: int,
        topk_group: int,
        renormalize: bool,
        routed_scaling_factor: float,
        mask_value: float,
        out: Any,
    ) -> None:
        native(
            logits, scoring == "sigmoid", correction_bias, num_expert_group, topk_group, renormalize,
            routed_scaling_factor, mask_value, out.weights, out.ids,
        )  # fmt: skip

    return run


def _permute(native: Any) -> Any:
    def run(x: Any, ids: Any, num_experts: int, alignment: int, expert_map: Any, out: Any) -> None:
        native(x, ids, alignment, expert_map, out.x, out.inverse, out.layout.starts, out.layout.counts)

    return run


def register() -> None:
    for name, needs, run, refuses in _NATIVE["fp8_gemm_nt"]:
        fp8_gemm_nt.add(Kernel(name, run, "cpu", needs, refuses, for_few_rows=name.endswith("_stream")))
    for name, needs, run, refuses, workspace in _NATIVE["fused_experts"]:
        for_few = name.endswith("_stream")
        fused_experts.add(Kernel(name, run, "cpu", needs, refuses, for_few, workspace=workspace))
    for name, needs, calls in _NATIVE["grouped"]:
        for spec in (m_grouped_fp8_gemm_nt_contiguous, m_grouped_fp8_gemm_nt_masked):
            run, refuses = calls[spec.name]
            spec.add(Kernel(name, run, "cpu", needs, refuses, for_few_rows=name.endswith("_stream")))
        run, refuses = calls[k_grouped_fp8_gemm_tn_contiguous.name]
        if not name.endswith("_stream"):  # which takes weights that are contiguous along k, not gradients
            k_grouped_fp8_gemm_tn_contiguous.add(Kernel(name, run, "cpu", needs, refuses))
    for name, needs, cast, silu_mul_cast, back in _NATIVE["cast"]:
        for spec in (per_token_cast_to_fp8, per_block_cast_to_fp8, per_channel_cast_to_fp8):
            spec.add(Kernel(name, _cast(cast), "cpu", needs))
        silu_mul_cast_to_fp8.add(Kernel(name, _cast(silu_mul_cast), "cpu", needs))
        dequantize.add(Kernel(name, _dequantize(back), "cpu", needs))
    for name, needs, gate, permute, unpermute in _NATIVE["routing"]:
        moe_gate.add(Kernel(name, _gate(gate), "cpu", needs))
        moe_permute.add(Kernel(name, _permute(permute), "cpu", needs))
        moe_unpermute.add(Kernel(name, unpermute, "cpu", needs))
