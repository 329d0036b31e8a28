"""Grouped products: the layers of a Mixture of Experts. Next: op.py, then backends/<device>/."""

from __future__ import annotations

from typing import Any

import torch

from moekern import _C
from moekern.layout import GroupedLayout
from moekern.op import op
from moekern.ops.gemm import Operand
from moekern.scaled import ScaledTensor, as_operand, as_scaled, as_tensor
from moekern.weights import GroupedWeights, as_weights

Weights = Any  # a stack as ScaledTensor or (data, scale), GroupedWeights, or a list of matrices


def _check_layout(layout: GroupedLayout, name: str) -> None:
    if type(layout) is not GroupedLayout:
        raise TypeError(f"{name}: layout is a {type(layout).__name__}; it must be a GroupedLayout")


def _prepare_m_grouped(name: str, masked: bool) -> Any:
    def prepare(
        a: Operand,
        b: Weights,
        layout: GroupedLayout,
        out: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Any, ...]:
        if type(a) is not ScaledTensor:
            a = as_operand(a, f"{name}: a")
        if type(b) is not ScaledTensor:
            b = as_weights(b, name, "b")
        _check_layout(layout, name)
        return _C.prepare_m_grouped(masked, a, b, layout, out, out_dtype)

    return prepare


def _m_grouped_reference(a: Operand, b: ScaledTensor | GroupedWeights, layout: GroupedLayout) -> torch.Tensor:
    left = a.to_float64() if isinstance(a, ScaledTensor) else a.to(torch.float64)
    rows = left.reshape(layout.rows, left.shape[-1])
    sums = rows.new_zeros(rows.shape[0], b.shape[1])
    for g, of_group in enumerate(layout.slices()):
        sums[of_group] = rows[of_group] @ b.group(g).to_float64().T
    return sums.view(*left.shape[:-1], b.shape[1])


@op(prepare=_prepare_m_grouped("m_grouped_fp8_gemm_nt_contiguous", masked=False))
def m_grouped_fp8_gemm_nt_contiguous(
    a: Operand,
    b: Weights,
    layout: GroupedLayout,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """D[i] = cast(A[i] B[g]^T) for every row i of group g: all experts' tokens, one after another.

    a: [M, K], FP8 with scales (W8A8) or float (W8A16), as for `fp8_gemm_nt`. Where one scale covers
        several rows, every group must begin with a block of its own.
    b: the weights of G groups, each [N, K] FP8 with scales: a stack as ScaledTensor or (data, scale),
        [G, N, K] and [G, rows, columns] of the scale grid; or GroupedWeights, for matrices that are tensors of
        their own. A list of such matrices will do, but is read anew by every call.
    layout: a contiguous GroupedLayout of G groups and M rows. Groups may have any number of rows, none too.
        What it holds is checked once more, since it may have been written to; on an accelerator it is not looked
        at, and rows that `a` does not have are left out.
    out: [M, N] to write to, or None to allocate. Rows that belong to no group are not written: what
        `out` holds there stays, and a result allocated here has zeros there.
    out_dtype: as for `fp8_gemm_nt`.

    Sums, special values and strides are as for `fp8_gemm_nt`. Two calls on one machine give the same bits
    whatever the number of threads, and a row's bits do not depend on other groups. They may depend on how
    many rows its own group has, unless `moekern.use(batch_invariant=True)`.

    Raises ValueError or TypeError naming the argument; NotSupported when no kernel takes the call.
    Method: DeepGEMM's function of that name; its m_indices are `GroupedLayout.from_indices`.
    """
    return _m_grouped_reference(a, b, layout)


@op(prepare=_prepare_m_grouped("m_grouped_fp8_gemm_nt_masked", masked=True))
def m_grouped_fp8_gemm_nt_masked(
    a: Operand,
    b: Weights,
    layout: GroupedLayout,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """D[g, i] = cast(A[g, i] B[g]^T) for i < counts[g]: tokens in slots of a fixed number for every expert.

    a: [G, capacity, K], float, or FP8 with scales [G, rows, columns] of the grid.
    layout: `GroupedLayout.from_masked(counts, capacity)`.
    out: [G, capacity, N] to write to, or None to allocate. Rows from counts[g] on are neither read nor
        written: what `out` holds there stays, and a result allocated here has zeros there.

    Otherwise as `m_grouped_fp8_gemm_nt_contiguous`. Method: DeepGEMM's function of that name.
    """
    return _m_grouped_reference(a, b, layout)


def _prepare_k_grouped(
    a: Operand,
    b: Operand,
    layout: GroupedLayout,
    c: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Any, ...]:
    name = "k_grouped_fp8_gemm_tn_contiguous"
    if type(a) is not ScaledTensor:
        a = as_operand(a, f"{name}: a")
    if type(b) is not ScaledTensor:
        b = as_scaled(b, f"{name}: b")
    if c is not None:
        c = as_tensor(c, f"{name}: c")
    _check_layout(layout, name)
    return _C.prepare_k_grouped(a, b, layout, c, out, out_dtype)


@op(prepare=_prepare_k_grouped)
def k_grouped_fp8_gemm_tn_contiguous(
    a: Operand,
    b: Operand,
    layout: GroupedLayout,
    c: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """D[g] = cast(C[g] + A[g]^T B[g]) over the rows of group g: the weight gradients of all experts.

    D[g, m, n] = cast(C[g, m, n] + sum_kb sa[kb, m] sb[kb, n] sum_(i in kb, i of group g) A[i, m] B[i, n])

    a: [K, M], K the rows of all groups: FP8 with scales, as `per_channel_cast_to_fp8` makes them (one for
        128 rows of a column), or float.
    b: [K, N] FP8 with scales, likewise.
    layout: a contiguous GroupedLayout of K rows. A group's blocks of scales count from its own first row,
        so that it starts at a multiple of 128; how many rows it has is free, as rows of no group do
        not count. `from_counts(ks, 128)` pads accordingly. A group of no rows has D[g] = C[g], or zeros.
    c: [G, M, N] to add to, or None. It may be `out` itself.
    out: [G, M, N] to write to, or None to allocate.
    out_dtype: of `out` if given, else float32.

    Otherwise as `fp8_gemm_nt`. Method: DeepGEMM's function of that name.
    """
    left = a.to_float64() if isinstance(a, ScaledTensor) else a.to(torch.float64)
    right = b.to_float64()
    sums = [left[rows].T @ right[rows] for rows in layout.slices()]
    product = torch.stack(sums) if sums else left.new_zeros(0, left.shape[1], right.shape[1])
    return product if c is None else product + c.to(torch.float64)
