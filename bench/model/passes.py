"""What moves bytes and multiplies next to nothing: casts, activation, gate, permute."""

from __future__ import annotations

from devices import Device

from model import constants
from model.gemm import BLOCK, Prediction


def moved(device: Device, bytes: float) -> Prediction:
    """One pass over so many bytes, read and written."""
    constant = constants.of_family(device.family)
    memory = bytes / (device.bandwidth.value * constant.memory)
    return Prediction(constant.launch + memory, 0.0, memory, 0.0, constant.launch)


def scales(columns: int) -> float:
    """Bytes of a row's scales."""
    return 4.0 * columns / BLOCK


def cast(device: Device, rows: float, columns: int) -> Prediction:
    """bf16 to 8 bits with 1x128 scales."""
    return moved(device, rows * (2 * columns + columns + scales(columns)))


def silu_mul_cast(device: Device, rows: float, columns: int) -> Prediction:
    """Gate and up, bf16, to 8 bits of half as many columns."""
    return moved(device, rows * (4 * columns + columns + scales(columns)))


def gate(device: Device, tokens: float, experts: int, top_k: int) -> Prediction:
    """f32 logits to the ids and weights of the chosen."""
    return moved(device, tokens * (4 * experts + 12 * top_k))


def permute(device: Device, tokens: float, columns: int, top_k: int) -> Prediction:
    """8-bit rows of tokens to top_k places each."""
    return moved(device, tokens * (1 + top_k) * (columns + scales(columns)))


def unpermute(device: Device, tokens: float, columns: int, top_k: int) -> Prediction:
    """The weighted sum of top_k bf16 rows."""
    return moved(device, tokens * (1 + top_k) * 2 * columns)
