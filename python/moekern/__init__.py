"""moekern: FP8 GEMM and Mixture-of-Experts kernels for the device you have."""

from moekern import runtime as _runtime  # first: connects _C to torch
from moekern.op import Device, Kernel, NotSupported, Op
from moekern.ops import (
    dequantize,
    fp8_gemm_nn,
    fp8_gemm_nt,
    fp8_gemm_tn,
    fp8_gemm_tt,
    per_block_cast_to_fp8,
    per_channel_cast_to_fp8,
    per_token_cast_to_fp8,
    silu_mul_cast_to_fp8,
)
from moekern.policy import explain, use
from moekern.scaled import ScaledTensor

__version__ = "0.1.0"

from moekern import backends as _backends  # noqa: E402  after the ops, which backends add kernels to
from moekern import library as _library  # noqa: E402
from moekern.policy import from_environment as _from_environment  # noqa: E402

_backends.load()
_library.register()
_from_environment()


def devices() -> list[Device]:
    """Every device that a backend found, the CPU first. `python -m moekern info` says why others are absent."""
    return [device for backend in _backends.loaded.values() for device in backend.devices]
