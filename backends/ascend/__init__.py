"""Huawei Ascend NPUs. No kernels yet: devices are found, so that `moekern info` can name them."""

from __future__ import annotations

import importlib.util

from moekern.op import Device


def probe() -> list[Device] | str:
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed"
    from torch_npu import npu

    if not npu.is_available():
        return "torch_npu finds no NPU"
    return [
        Device("npu", npu.get_device_name(index).lower(), index=index, name=npu.get_device_name(index))
        for index in range(npu.device_count())
    ]


def torch_devices(device: Device) -> list[str]:
    return [f"npu:{device.index}"]


def register() -> None:
    """Adds no kernel yet."""
