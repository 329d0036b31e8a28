"""AMD GPUs: Triton kernels on what torch has there."""

from __future__ import annotations

import functools

import torch

from moekern.backends._triton import kernels
from moekern.backends._triton.targets import Target, macs, native_formats
from moekern.backends.rocm import tiles
from moekern.op import Device


def _arch(properties: object) -> str:
    return str(properties.gcnArchName).split(":")[0]  # type: ignore[attr-defined]


def probe() -> list[Device] | str:
    if torch.version.hip is None:
        return "this torch is built without ROCm"
    if not torch.cuda.is_available():
        return "torch finds no ROCm device or driver"
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(kernels.device("rocm", _arch(properties), index, properties.name))
    return devices


def torch_devices(device: Device) -> list[str]:
    return [f"cuda:{device.index}"]  # torch names HIP devices "cuda"


@functools.cache
def target_of(where: torch.device) -> Target:
    properties = torch.cuda.get_device_properties(where)
    arch = _arch(properties)
    return Target(
        "hip",
        arch,
        properties.warp_size,
        properties.shared_memory_per_block,
        properties.multi_processor_count,
        native_formats(arch),
        macs(arch),
        properties.name,
    )


FAMILY = kernels.Family("rocm", "rocm", target_of, tiles.choose, tiles.choose_for_few_rows)


def register() -> None:
    for op, kernel in kernels.kernels(FAMILY):
        op.add(kernel)
