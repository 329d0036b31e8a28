"""The CPU's kernels: weights are decoded to f32 or bf16 in registers, and multiplied by the vector units.

Two shapes of kernel, of which the faster counts: one streams the weights once and decodes them where they are used,
one packs them for many rows. Rates are limits measured in the same run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache

from devices import Device

from model.constants import PATH
from model.gemm import Prediction, Product, overlapped

CALL = 5e-6  # seconds of a call so small that its arithmetic hardly counts
CORES = {"x86_64 25/17": "Zen 4", "x86_64 25/1": "Zen 3"}  # with constants of their own, by architecture, family/model
OTHERS = "x86_64 25/17"  # whose constants all others borrow


@dataclass(frozen=True)
class CpuConstants:
    stream_rate: float  # share of the multiply-add limit
    stream_decode: float  # operations that decoding a weight takes the place of
    packed_rate: float
    packed_decode: float  # with the transposition into a strip
    memory: float  # share of the read limit
    overlap: float


@cache
def of_core(core: str) -> CpuConstants:
    table = json.loads(PATH.read_text())["cpus"]
    return CpuConstants(**table.get(core, table[OTHERS]))


def predict(device: Device, product: Product, constant: CpuConstants | None = None) -> Prediction:
    """fp8_gemm_nt and the grouped products, by the faster kernel of every group."""
    constant = constant or of_core(device.arch)
    peak = device.peak["fp8"].value

    def seconds(m: int) -> float:
        stream = (2 * m + constant.stream_decode) / constant.stream_rate
        packed = (2 * m + constant.packed_decode) / constant.packed_rate
        return product.n * product.k * min(stream, packed) / peak

    compute = sum(map(seconds, product.rows))
    memory = product.bytes / (device.bandwidth.value * constant.memory)
    return Prediction(CALL + overlapped(constant.overlap, compute, memory), compute, memory, 0.0, CALL)
