"""Specs: signature, docstring and float64 reference of every op. Kernels live in moekern.backends."""

from moekern.ops.experts import batched_experts, fused_experts, fused_experts_workspace
from moekern.ops.gate import Routing, moe_gate
from moekern.ops.gemm import fp8_gemm_nn, fp8_gemm_nt, fp8_gemm_tn, fp8_gemm_tt
from moekern.ops.grouped import (
    k_grouped_fp8_gemm_tn_contiguous,
    m_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nt_masked,
)
from moekern.ops.permute import Permuted, moe_permute, moe_unpermute, permuted_rows
from moekern.ops.quantize import (
    dequantize,
    per_block_cast_to_fp8,
    per_channel_cast_to_fp8,
    per_token_cast_to_fp8,
    silu_mul_cast_to_fp8,
)

OPS = (
    fp8_gemm_nt,
    m_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nt_masked,
    k_grouped_fp8_gemm_tn_contiguous,
    per_token_cast_to_fp8,
    per_block_cast_to_fp8,
    per_channel_cast_to_fp8,
    silu_mul_cast_to_fp8,
    dequantize,
    moe_gate,
    moe_permute,
    moe_unpermute,
    fused_experts,
)

__all__ = [
    "OPS",
    "Permuted",
    "Routing",
    "batched_experts",
    "dequantize",
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
]
