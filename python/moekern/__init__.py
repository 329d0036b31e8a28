"""moekern: FP8 GEMM and Mixture-of-Experts kernels for the device you have."""

import os as _os
import sys as _sys

__version__ = "0.1.0"
__all__ = [
    "Device",
    "ExpertWeights",
    "GroupedLayout",
    "GroupedWeights",
    "Kernel",
    "NotSupported",
    "Op",
    "Permuted",
    "Routing",
    "ScaledTensor",
    "batched_experts",
    "dequantize",
    "devices",
    "explain",
    "fp8_gemm_nn",
    "fp8_gemm_nt",
    "fp8_gemm_tn",
    "fp8_gemm_tt",
    "fused_experts",
    "fused_experts_workspace",
    "k_grouped_fp8_gemm_tn_contiguous",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
    "moe_gate",
    "moe_permute",
    "moe_unpermute",
    "per_block_cast_to_fp8",
    "per_channel_cast_to_fp8",
    "per_token_cast_to_fp8",
    "permuted_rows",
    "silu_mul_cast_to_fp8",
    "use",
]


def _serves_command() -> bool:
    """Whether this is `python -m moekern` (argv[0] is "-m" until its file is found) or the `moekern` script."""
    started_as = _sys.argv[0] if _sys.argv else ""
    return (started_as == "-m" and "moekern" in _sys.orig_argv) or _os.path.basename(started_as) == "moekern"


_import_error: Exception | None = None
try:
    from moekern.experts import ExpertWeights
    from moekern.layout import GroupedLayout
    from moekern.op import Device, Kernel, NotSupported, Op
    from moekern.ops import (
        Permuted,
        Routing,
        batched_experts,
        dequantize,
        fp8_gemm_nn,
        fp8_gemm_nt,
        fp8_gemm_tn,
        fp8_gemm_tt,
        fused_experts,
        fused_experts_workspace,
        k_grouped_fp8_gemm_tn_contiguous,
        m_grouped_fp8_gemm_nt_contiguous,
        m_grouped_fp8_gemm_nt_masked,
        moe_gate,
        moe_permute,
        moe_unpermute,
        per_block_cast_to_fp8,
        per_channel_cast_to_fp8,
        per_token_cast_to_fp8,
        permuted_rows,
        silu_mul_cast_to_fp8,
    )
    from moekern.policy import explain, use
    from moekern.policy import from_environment as _from_environment
    from moekern.runtime import connect as _connect
    from moekern.scaled import ScaledTensor
    from moekern.weights import GroupedWeights

    # After the ops, which backends add kernels to.
    from moekern.backends import devices  # isort: skip
    from moekern.backends import load as _load_backends  # isort: skip
    from moekern.library import register as _register_operators  # isort: skip

    _connect()
    _load_backends()
    _register_operators()
    _from_environment()
except Exception as error:
    # `python -m moekern info` tells what is wrong, and Python imports this package before it.
    if not _serves_command():
        raise
    _import_error = error
