"""A product by the model of the device's kind: tiles on cores with a matrix unit, or a CPU's vectors."""

from __future__ import annotations

from devices import Device

from model import cpu, gemm
from model.gemm import Prediction, Product


def predict(device: Device, product: Product, dtype: str | None = None) -> Prediction:
    return cpu.predict(device, product) if device.family == "cpu" else gemm.predict(device, product, dtype)
