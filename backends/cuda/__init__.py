"""NVIDIA GPUs: Triton kernels on what torch, CuPy and others have there."""

from __future__ import annotations

import functools

import torch

from moekern.backends._triton import kernels
from moekern.backends._triton.targets import Target, macs, native_formats
from moekern.backends.cuda import tiles
from moekern.op import Device


def probe() -> list[Device] | str:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device or driver"
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        arch = f"sm_{properties.major}{properties.minor}"
        devices.append(kernels.device("cuda", arch, index, properties.name))
    return devices


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
    for op, kernel in kernels.kernels(FAMILY):
        op.add(kernel)
