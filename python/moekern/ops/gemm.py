"""fp8_gemm_nt and its transposed forms. Next: op.py, then backends/<device>/."""

from __future__ import annotations

from typing import Any

import torch

from moekern import _C
from moekern.op import op
from moekern.scaled import ScaledTensor, as_operand, as_tensor

Operand = Any  # ScaledTensor, (data, scale), or a float tensor


def _prepare(
    a: Operand,
    b: Operand,
    c: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Any, ...]:
    if type(a) is not ScaledTensor:
        a = as_operand(a, "fp8_gemm_nt: a")
    if type(b) is not ScaledTensor:
        b = as_operand(b, "fp8_gemm_nt: b")
    if c is not None:
        c = as_tensor(c, "fp8_gemm_nt: c")
    if bias is not None:
        bias = as_tensor(bias, "fp8_gemm_nt: bias")
    return _C.prepare_gemm(a, b, c, bias, out, out_dtype)


@op(prepare=_prepare)
def fp8_gemm_nt(
    a: Operand,
    b: Operand,
    c: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """D = cast(C + bias + A B^T), FP8 weights and FP8 or float activations.

    D[m, n] = cast(C[m, n] + bias[n] + sum_kb sa[m, kb] sb[n // 128, kb] sum_(k in kb) A[m, k] B[n, k])

    a: [M, K]. FP8 with scales (W8A8), as ScaledTensor or (data, scale); or float32, float16 or
        bfloat16 (W8A16), used exactly.
    b: [N, K] FP8 with scales, as ScaledTensor or (data, scale). Used in place: no repacking, no copy.
        M, N and K are free: blocks at the edges may be partial.
    c: [M, N] to add to, or None. It may be `out` itself.
    bias: [N] or None.
    out: [M, N] to write to, or None to allocate.
    out_dtype: torch.bfloat16, float16 or float32; of `out` if given, else of a float `a`, else bfloat16.

    Sums are accumulated in float32 or better. NaN and infinities propagate. Two calls on one machine
    give the same bits whatever the number of threads. Any strides are taken; other than row-major `b`
    goes to another kernel, slower and with other last bits.

    Raises ValueError or TypeError naming the argument; NotSupported when no kernel takes the call.
    Method and scale layout: DeepSeek-V3 (arXiv:2412.19437, section 3.3), DeepGEMM's `fp8_gemm_nt`.
    """
    left = a.to_float64() if isinstance(a, ScaledTensor) else a.to(torch.float64)
    sums = left @ b.to_float64().T
    for term in (bias, c):
        if term is not None:
            sums = sums + term.to(torch.float64)
    return sums


def _transposed(x: Operand, what: str) -> Operand:
    x = as_operand(x, what)
    if len(x.shape) != 2:
        raise ValueError(f"{what} has {len(x.shape)} dimensions; it must have 2")
    return x.T


def fp8_gemm_nn(a: Operand, b: Operand, **options: Any) -> torch.Tensor:
    """D = A B + C: `fp8_gemm_nt` with b [K, N]. Its scale grid is transposed with it."""
    return fp8_gemm_nt(a, _transposed(b, "fp8_gemm_nn: b"), **options)


def fp8_gemm_tn(a: Operand, b: Operand, **options: Any) -> torch.Tensor:
    """D = A^T B + C: `fp8_gemm_nt` with a [K, M] and b [K, N]."""
    return fp8_gemm_nt(_transposed(a, "fp8_gemm_tn: a"), _transposed(b, "fp8_gemm_tn: b"), **options)


def fp8_gemm_tt(a: Operand, b: Operand, **options: Any) -> torch.Tensor:
    """D = A^T B^T + C: `fp8_gemm_nt` with a [K, M]."""
    return fp8_gemm_nt(_transposed(a, "fp8_gemm_tt: a"), b, **options)
