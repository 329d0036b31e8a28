"""AMD GPUs. No kernels yet: devices are found, so that `moekern info` can name them."""

from __future__ import annotations

import torch

from moekern.op import Device


def probe() -> list[Device] | str:
    if torch.version.hip is None:
        return "this torch is built without ROCm"
    if not torch.cuda.is_available():
        return "torch finds no ROCm device or driver"
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        arch = properties.gcnArchName.split(":")[0]
        devices.append(Device("rocm", arch, index=index, name=properties.name))
    return devices


def torch_devices(device: Device) -> list[str]:
    return [f"cuda:{device.index}"]  # torch names HIP devices "cuda"


def register() -> None:
    """Adds no kernel yet."""
