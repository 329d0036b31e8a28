"""DeepGEMM's names and argument order on moekern's kernels: `import moekern.compat.deep_gemm as deep_gemm`.

The names of today's DeepGEMM and those of its 2025 releases, for the ops that moekern has. A call
writes to the caller's `d` and returns None, as there. Scales are float32, or DeepGEMM's int32 with
four ue8m0 along k; their layout is free, MN-major and TMA-aligned ones included. Hints for
DeepGEMM's compiler (`compiled_dims`) and its scale conversion (`disable_ue8m0_cast`: here scales
are always used as they are) are accepted and change nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

import moekern
from moekern import GroupedLayout
from moekern import op as _dispatcher
from moekern.layout import at_hand
from moekern.scaled import BLOCK, ScaledTensor

__all__ = [
    "calc_diff",
    "ceil_div",
    "fp8_gemm_nn",
    "fp8_gemm_nt",
    "fp8_gemm_tn",
    "fp8_gemm_tt",
    "fp8_m_grouped_gemm_nt_masked",
    "gemm_fp8_fp8_bf16_nt",
    "get_col_major_tma_aligned_tensor",
    "get_k_alignment_for_contiguous_layout",
    "get_m_alignment_for_contiguous_layout",
    "get_mk_alignment_for_contiguous_layout",
    "get_mn_major_tma_aligned_tensor",
    "get_num_sms",
    "get_theoretical_mk_alignment_for_contiguous_layout",
    "get_tma_aligned_size",
    "k_grouped_fp8_gemm_tn_contiguous",
    "m_grouped_fp8_gemm_nn_contiguous",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
    "m_grouped_gemm_fp8_fp8_bf16_nt_contiguous",
    "m_grouped_gemm_fp8_fp8_bf16_nt_masked",
    "per_block_cast_to_fp8",
    "per_channel_cast_to_fp8",
    "per_token_cast_to_fp8",
    "set_mk_alignment_for_contiguous_layout",
    "set_num_sms",
    "wgrad_gemm_fp8_fp8_fp32_nt",
]

Scaled = tuple[torch.Tensor, torch.Tensor]  # (data, scale factors)
Recipe = tuple[int, int, int]  # rows of a, rows of b and columns of both that share a scale
HalfRecipe = tuple[int, int]  # rows and columns that share a scale


# ---- GEMM --------------------------------------------------------------------------------------------


def fp8_gemm_nt(
    a: Scaled,
    b: Scaled,
    d: torch.Tensor,
    c: torch.Tensor | None = None,
    recipe: Recipe | None = None,
    recipe_a: HalfRecipe | None = None,
    recipe_b: HalfRecipe | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """D = C + A B^T, written to d. a: ([M, K], sfa), b: ([N, K], sfb), d and c: [M, N].

    recipe: (1, 128, 128) takes sfa [M, ceil(K / 128)] and sfb [ceil(N / 128), ceil(K / 128)];
        (1, 1, 128) takes sfb [N, ceil(K / 128)]. recipe_a and recipe_b say the same by operand, as
        (rows, columns). Without any of them the first for float32 sfb, the second for int32.
    c: to add to; it may be d itself.

    Raises ValueError or TypeError naming the argument. See moekern.fp8_gemm_nt for the arithmetic.
    """
    _check_output("fp8_gemm_nt", d)
    left, right = _operands("fp8_gemm_nt", a, b, recipe, recipe_a, recipe_b)
    moekern.fp8_gemm_nt(left, right, c, None, d)


def fp8_gemm_nn(
    a: Scaled, b: Scaled, d: torch.Tensor, c: torch.Tensor | None = None, *options: Any, **named: Any
) -> None:
    """D = C + A B: `fp8_gemm_nt` with b ([K, N], sfb transposed with it)."""
    fp8_gemm_nt(a, _transposed(b), d, c, *options, **named)


def fp8_gemm_tn(
    a: Scaled, b: Scaled, d: torch.Tensor, c: torch.Tensor | None = None, *options: Any, **named: Any
) -> None:
    """D = C + A^T B: `fp8_gemm_nt` with a ([K, M], sfa transposed with it) and b ([K, N], likewise)."""
    fp8_gemm_nt(_transposed(a), _transposed(b), d, c, *options, **named)


def fp8_gemm_tt(
    a: Scaled, b: Scaled, d: torch.Tensor, c: torch.Tensor | None = None, *options: Any, **named: Any
) -> None:
    """D = C + A^T B^T: `fp8_gemm_nt` with a ([K, M], sfa transposed with it)."""
    fp8_gemm_nt(_transposed(a), b, d, c, *options, **named)


def gemm_fp8_fp8_bf16_nt(lhs: Scaled, rhs: Scaled, out: torch.Tensor) -> None:
    """The 2025 name of `fp8_gemm_nt` with a bfloat16 out and recipe (1, 128, 128)."""
    _check_dtype("gemm_fp8_fp8_bf16_nt", out, torch.bfloat16)
    fp8_gemm_nt(lhs, rhs, out, recipe=(1, BLOCK, BLOCK))


def wgrad_gemm_fp8_fp8_fp32_nt(lhs: Scaled, rhs: Scaled, out: torch.Tensor) -> None:
    """The 2025 weight gradient: out += lhs rhs^T in float32, both sides with 1x128 scales."""
    _check_dtype("wgrad_gemm_fp8_fp8_fp32_nt", out, torch.float32)
    fp8_gemm_nt(lhs, rhs, out, c=out, recipe=(1, 1, BLOCK))


def _check_dtype(name: str, out: torch.Tensor, dtype: torch.dtype) -> None:
    if out.dtype != dtype:
        raise TypeError(f"{name}: out has dtype {out.dtype}; it must be {dtype}")


def _check_output(name: str, d: torch.Tensor | None) -> None:
    if d is None:
        raise TypeError(f"{name}: d is None; the caller allocates it")


def _transposed(x: Scaled) -> Scaled:
    return x[0].mT, x[1].mT


def _operands(
    name: str, a: Scaled, b: Scaled, recipe: Recipe | None, recipe_a: HalfRecipe | None, recipe_b: HalfRecipe | None
) -> tuple[ScaledTensor, ScaledTensor]:
    block_a, block_b = _blocks(name, b[1], recipe, recipe_a, recipe_b)
    return _operand(name, "a", a, block_a), _operand(name, "b", b, block_b)


def _blocks(
    name: str, sfb: torch.Tensor, recipe: Recipe | None, recipe_a: HalfRecipe | None, recipe_b: HalfRecipe | None
) -> tuple[HalfRecipe, HalfRecipe]:
    if (recipe_a is None) != (recipe_b is None):
        raise ValueError(f"{name}: recipe_a and recipe_b go together; only one is given")
    if recipe_a is not None and recipe_b is not None:
        if recipe is not None:
            raise ValueError(f"{name}: recipe and the pair recipe_a, recipe_b exclude each other; both are given")
        return _block(name, "recipe_a", recipe_a), _block(name, "recipe_b", recipe_b)
    if recipe is None:
        recipe = (1, 1, BLOCK) if sfb.dtype == torch.int32 else (1, BLOCK, BLOCK)
    if tuple(recipe) not in ((1, BLOCK, BLOCK), (1, 1, BLOCK)):
        raise ValueError(f"{name}: recipe is {recipe}; it is (1, 128, 128) or (1, 1, 128)")
    return (recipe[0], recipe[2]), (recipe[1], recipe[2])


def _block(name: str, which: str, recipe: HalfRecipe) -> HalfRecipe:
    if tuple(recipe) not in ((1, BLOCK), (BLOCK, BLOCK)):
        raise ValueError(f"{name}: {which} is {recipe}; it is (1, 128) or (128, 128)")
    return recipe


def _operand(name: str, which: str, x: Scaled, block: HalfRecipe) -> ScaledTensor:
    data, scale = x
    if scale.dtype == torch.int32 and data.dim() in (2, 3):
        blocks = ceil_div(data.shape[-1], block[1])
        packed = (*data.shape[:-2], ceil_div(data.shape[-2], block[0]), ceil_div(blocks, 4))
        if scale.shape != packed:
            raise ValueError(
                f"{name}: the int32 scale of {which} has shape {list(scale.shape)}; "
                f"four ue8m0 a word take {list(packed)}"
            )
        # A word is four neighbours along k, the first in the lowest byte; only a row-major copy shows them as such.
        scale = scale.clone(memory_format=torch.contiguous_format).view(torch.float8_e8m0fnu)[..., :blocks]
    return ScaledTensor(data, scale, block)


# ---- grouped GEMM ------------------------------------------------------------------------------------


def m_grouped_fp8_gemm_nt_contiguous(
    a: Scaled,
    b: Scaled,
    d: torch.Tensor,
    grouped_layout: torch.Tensor,
    recipe: Recipe | None = None,
    recipe_a: HalfRecipe | None = None,
    recipe_b: HalfRecipe | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
) -> None:
    """D[i] = A[i] B[g]^T for the rows i of every group g. a: ([M, K], sfa), b: ([G, N, K], sfb), d: [M, N].

    grouped_layout: int32 [M], the group of every row or -1; with use_psum_layout int32 [G], where group g's
        rows end, the next group starting at a multiple of `get_mk_alignment_for_contiguous_layout()`.
        Every label is read, so labels at a finer alignment are right, too; groups that are not
        in one piece each, or out of order, are an error. On an accelerator they are taken at their word.
    ensure_zero_padding: with use_psum_layout, rows of d that belong to no group become zero; they are left
        alone otherwise.
    expected_m_for_psum_layout: a hint, ignored.

    See moekern.m_grouped_fp8_gemm_nt_contiguous and moekern.GroupedLayout.
    """
    name = "m_grouped_fp8_gemm_nt_contiguous"
    _check_output(name, d)
    left, right = _operands(name, a, b, recipe, recipe_a, recipe_b)
    check = at_hand(grouped_layout)
    if use_psum_layout:
        layout = GroupedLayout.from_ends(grouped_layout, _mk_alignment, rows=left.shape[0], check=check)
    else:
        layout = GroupedLayout.from_indices(grouped_layout, right.shape[0], alignment=1, check=check)
    moekern.m_grouped_fp8_gemm_nt_contiguous(left, right, layout, d)
    if use_psum_layout and ensure_zero_padding:
        d.masked_fill_((layout.indices() < 0).unsqueeze(1), 0)


def m_grouped_fp8_gemm_nn_contiguous(
    a: Scaled, b: Scaled, d: torch.Tensor, grouped_layout: torch.Tensor, *options: Any, **named: Any
) -> None:
    """D[i] = A[i] B[g]: `m_grouped_fp8_gemm_nt_contiguous` with b ([G, K, N], sfb transposed with it)."""
    m_grouped_fp8_gemm_nt_contiguous(a, _transposed(b), d, grouped_layout, *options, **named)


def m_grouped_fp8_gemm_nt_masked(
    a: Scaled,
    b: Scaled,
    d: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int,
    recipe: Recipe | None = None,
    recipe_a: HalfRecipe | None = None,
    recipe_b: HalfRecipe | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """D[g, i] = A[g, i] B[g]^T for i < masked_m[g]. a: ([G, M, K], sfa), b: ([G, N, K], sfb), d: [G, M, N].

    masked_m: int32 [G], on an accelerator taken at its word. expected_m: a hint, ignored; any number of rows up to M
        is right.

    See moekern.m_grouped_fp8_gemm_nt_masked.
    """
    name = "m_grouped_fp8_gemm_nt_masked"
    _check_output(name, d)
    left, right = _operands(name, a, b, recipe, recipe_a, recipe_b)
    layout = GroupedLayout.from_masked(masked_m, left.shape[-2], check=at_hand(masked_m))
    moekern.m_grouped_fp8_gemm_nt_masked(left, right, layout, d)


def k_grouped_fp8_gemm_tn_contiguous(
    a: Scaled,
    b: Scaled,
    d: torch.Tensor,
    ks: Sequence[int],
    ks_tensor: torch.Tensor,
    c: torch.Tensor | None = None,
    recipe: Recipe = (1, 1, BLOCK),
    compiled_dims: str = "mn",
    use_psum_layout: bool = False,
) -> None:
    """D[g] = C[g] + A[g]^T B[g] over the rows of group g. a: ([K, M], sfa), b: ([K, N], sfb), d and c: [G, M, N].

    Scales are float32, one for 128 rows of a column, as `per_channel_cast_to_fp8` makes them.
    ks: the rows of every group, multiples of 128.
    ks_tensor: the same as a tensor, used on an accelerator only; with use_psum_layout int32 [G], where group g's rows
        end, the next group starting at a multiple of `get_mk_alignment_for_contiguous_layout()`.
    c: to add to; it may be d itself.

    See moekern.k_grouped_fp8_gemm_tn_contiguous.
    """
    name = "k_grouped_fp8_gemm_tn_contiguous"
    _check_output(name, d)
    if tuple(recipe) != (1, 1, BLOCK):
        raise ValueError(f"{name}: recipe is {recipe}; it is (1, 1, 128)")
    for which, x in (("a", a), ("b", b)):
        if x[1].dtype == torch.int32:
            raise TypeError(f"{name}: the scale of {which} has dtype torch.int32; it must be torch.float32")
    rows = a[0].shape[0]
    if use_psum_layout:
        layout = GroupedLayout.from_ends(ks_tensor, _mk_alignment, rows=rows, check=at_hand(ks_tensor))
    else:
        layout = GroupedLayout.from_counts(list(ks), rows=rows)
        if not at_hand(a[0]):
            layout = GroupedLayout.from_counts(ks_tensor, rows=rows, check=False)
    left, right = (ScaledTensor(*x, (BLOCK, 1)) for x in (a, b))
    moekern.k_grouped_fp8_gemm_tn_contiguous(left, right, layout, c, d)


def m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(
    lhs: Scaled, rhs: Scaled, out: torch.Tensor, m_indices: torch.Tensor
) -> None:
    """The 2025 name of `m_grouped_fp8_gemm_nt_contiguous` with a bfloat16 out and recipe (1, 128, 128)."""
    _check_dtype("m_grouped_gemm_fp8_fp8_bf16_nt_contiguous", out, torch.bfloat16)
    m_grouped_fp8_gemm_nt_contiguous(lhs, rhs, out, m_indices, recipe=(1, BLOCK, BLOCK))


def m_grouped_gemm_fp8_fp8_bf16_nt_masked(
    lhs: Scaled, rhs: Scaled, out: torch.Tensor, masked_m: torch.Tensor, expected_m: int
) -> None:
    """The 2025 name of `m_grouped_fp8_gemm_nt_masked` with a bfloat16 out and recipe (1, 128, 128)."""
    _check_dtype("m_grouped_gemm_fp8_fp8_bf16_nt_masked", out, torch.bfloat16)
    m_grouped_fp8_gemm_nt_masked(lhs, rhs, out, masked_m, expected_m, recipe=(1, BLOCK, BLOCK))


fp8_m_grouped_gemm_nt_masked = m_grouped_fp8_gemm_nt_masked  # a name between the two


# ---- casts -------------------------------------------------------------------------------------------


def per_token_cast_to_fp8(x: torch.Tensor, use_ue8m0: bool = False, gran_k: int = BLOCK) -> Scaled:
    """(q, s), one scale per row and 128 columns: `moekern.per_token_cast_to_fp8`. use_ue8m0 rounds scales up to 2^i."""
    _check_granularity("per_token_cast_to_fp8", gran_k)
    return _pair(moekern.per_token_cast_to_fp8(x, round_scale_up=use_ue8m0))


def per_block_cast_to_fp8(x: torch.Tensor, use_ue8m0: bool = False, gran_k: int = BLOCK) -> Scaled:
    """(q, s), one scale per 128 x 128 block: `moekern.per_block_cast_to_fp8`."""
    _check_granularity("per_block_cast_to_fp8", gran_k)
    return _pair(moekern.per_block_cast_to_fp8(x, round_scale_up=use_ue8m0))


def per_channel_cast_to_fp8(x: torch.Tensor, use_ue8m0: bool = False, gran_k: int = BLOCK) -> Scaled:
    """(q, s), one scale per column and 128 rows: `moekern.per_channel_cast_to_fp8`."""
    _check_granularity("per_channel_cast_to_fp8", gran_k)
    return _pair(moekern.per_channel_cast_to_fp8(x, round_scale_up=use_ue8m0))


def _check_granularity(name: str, gran_k: int) -> None:
    if gran_k != BLOCK:
        raise ValueError(f"{name}: gran_k is {gran_k}; it is {BLOCK}")


def _pair(x: ScaledTensor) -> Scaled:
    return x.data, x.scale


# ---- scale layouts -----------------------------------------------------------------------------------


def get_tma_aligned_size(x: int, element_size: int) -> int:
    """x elements rounded up to whole 16 bytes, in elements."""
    per_unit = 16 // element_size
    return ceil_div(x, per_unit) * per_unit


def get_mn_major_tma_aligned_tensor(sf: torch.Tensor) -> torch.Tensor:
    """The same [..., MN, K'] values with stride 1 along MN and whole 16 bytes between columns.

    `sf` itself when it is laid out so. No kernel here needs it; code written for DeepGEMM calls it.
    """
    if sf.dim() not in (2, 3):
        raise ValueError(f"sf has {sf.dim()} dimensions; it has 2, or 3 with groups")
    mn, k = sf.shape[-2:]
    aligned = get_tma_aligned_size(mn, sf.element_size())
    strides = (aligned * k, 1, aligned)[-sf.dim() :]
    if sf.stride() == strides:
        return sf
    storage = sf.new_zeros((*sf.shape[:-2], k, aligned))
    return storage.as_strided(sf.shape, strides).copy_(sf)


get_col_major_tma_aligned_tensor = get_mn_major_tma_aligned_tensor  # its 2025 name


_mk_alignment = BLOCK


def get_mk_alignment_for_contiguous_layout() -> int:
    """The multiple at which groups start in contiguous layouts: what callers pad to. 128 unless set."""
    return _mk_alignment


def set_mk_alignment_for_contiguous_layout(alignment: int) -> None:
    """What `get_mk_alignment_for_contiguous_layout` returns from now on, and where groups of psum layouts start."""
    global _mk_alignment
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"alignment is {alignment!r}; it is a positive integer")
    _mk_alignment = alignment


def get_theoretical_mk_alignment_for_contiguous_layout(
    expected_m: int | None = None, num_groups: int | None = None
) -> int:
    """The least alignment that m-grouped kernels can do with: 1, none. The arguments are hints, ignored."""
    return 1


get_m_alignment_for_contiguous_layout = get_mk_alignment_for_contiguous_layout  # its 2025 name


def get_k_alignment_for_contiguous_layout() -> int:
    """The multiple at which groups start in k-grouped layouts: a block of scales."""
    return BLOCK


# ---- the rest ----------------------------------------------------------------------------------------


def set_num_sms(num_sms: int) -> None:
    """How many of the device's units kernels may use: CPU threads, as `moekern.use(num_threads=num_sms)`."""
    available = os.cpu_count() or 1
    if not 0 < num_sms <= available:
        raise ValueError(f"num_sms is {num_sms}; this CPU has {available} units")
    moekern.use(num_threads=num_sms)


def get_num_sms() -> int:
    """How many of the device's units kernels use: CPU threads."""
    return _dispatcher.policy.num_threads or torch.get_num_threads()


def ceil_div(x: int, y: int) -> int:
    """x / y rounded up."""
    return (x + y - 1) // y


def calc_diff(x: torch.Tensor, y: torch.Tensor) -> float:
    """1 - 2 <x, y> / (|x|^2 + |y|^2) in float64: 0 for equal tensors, even for two of zeros.

    DeepGEMM's measure of quantisation error. One number for a whole tensor: a wrong row hides in it.
    """
    x, y = x.double(), y.double()
    norms = float((x * x + y * y).sum())
    return 1.0 - 2.0 * float((x * y).sum()) / norms if norms else 0.0
