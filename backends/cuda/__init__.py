"""NVIDIA GPUs: hand-written kernels on Hopper, Triton's on all, on what torch, CuPy and others have there."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from moekern import _C
from moekern.backends import _native
from moekern.backends._triton import kernels
from moekern.backends._triton.targets import Target, macs, native_formats
from moekern.backends.cuda import tiles
from moekern.op import Device, Kernel, NotSupported, Op
from moekern.ops import OPS

HOPPER = "hopper"  # the feature that the hand-written kernels need, and their name
_FOR_FEW_ROWS = ("fp8_gemm_nt", "m_grouped_fp8_gemm_nt_contiguous", "m_grouped_fp8_gemm_nt_masked")
_TRITONS_ALONE = ("fused_experts",)


def probe() -> list[Device] | str:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device or driver"
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        arch = f"sm_{properties.major}{properties.minor}"
        device = kernels.device("cuda", arch, index, properties.name)
        if reason := why_not_hopper(arch):
            devices.append(replace(device, without=(*device.without, (HOPPER, reason))))
        else:
            devices.append(replace(device, features=device.features | {HOPPER}))
    return devices


def why_not_hopper(arch: str) -> str | None:
    """Why the hand-written kernels cannot run on a device that torch has found, or None. Opens the driver's library."""
    if arch != "sm_90":
        return f"these kernels are for sm_90, not {arch}"
    if "cuda" not in _C.native:
        return "this moekern is built without them (MOEKERN_CUDA was off)"
    return _C.native["cuda"]["why_no_driver"]() or None


def torch_devices(device: Device) -> list[str]:
    return [f"cuda:{device.index}"]


@functools.cache
def target_of(where: torch.device) -> Target:
    properties = torch.cuda.get_device_properties(where)
    arch = 10 * properties.major + properties.minor
    return Target(
        "cuda",
        arch,
        properties.warp_size,
        getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block),
        properties.multi_processor_count,
        native_formats(f"sm_{arch}"),
        macs(f"sm_{arch}"),
        properties.name,
    )


FAMILY = kernels.Family("cuda", "cuda", target_of, tiles.choose, tiles.choose_for_few_rows)


def register() -> None:
    if "cuda" in _C.native:
        _native.register("cuda", "cuda")
    else:
        for op in OPS:
            for name in names(op):
                op.add(Kernel(name, _not_built(op, name), "cuda", frozenset({HOPPER})))
    for op, kernel in kernels.kernels(FAMILY):
        op.add(kernel)


def names(op: Op) -> list[str]:
    """Of the hand-written kernels of an op, best first."""
    if op.name in _TRITONS_ALONE:
        return []
    return [f"cuda.{HOPPER}{few}" for few in (("_stream", "") if op.name in _FOR_FEW_ROWS else ("",))]


def _not_built(op: Op, name: str) -> Callable[..., None]:
    """Stands in the list of kernels, so that what is said of a call has the reason. No device has what it needs."""

    def run(*call: Any) -> None:
        raise NotSupported(f"{op.name}: {name} is not built")

    run.__signature__ = inspect.signature(op.reference)  # type: ignore[attr-defined]
    return run
