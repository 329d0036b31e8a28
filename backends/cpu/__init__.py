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


def register() -> None:
    for name, needs, run, refuses in _NATIVE["fp8_gemm_nt"]:
        fp8_gemm_nt.add(Kernel(name, run, "cpu", needs, refuses, for_few_rows=name.endswith("_stream")))
    for name, needs, run, refuses, workspace in _NATIVE["fused_experts"]:
        for_few = name.endswith("_stream")
        fused_experts.add(Kernel(name, run, "cpu", needs, refuses, for_few, workspace=workspace))
    for name, needs, cast, silu_mul_cast, back in _NATIVE["cast"]:
        for spec in (per_token_cast_to_fp8, per_block_cast_to_fp8, per_channel_cast_to_fp8):
            spec.add(Kernel(name, _cast(cast), "cpu", needs))
        silu_mul_cast_to_fp8.add(Kernel(name, _cast(silu_mul_cast), "cpu", needs))
        dequantize.add(Kernel(name, _dequantize(back), "cpu", needs))
