"""moekern.compat.deep_gemm against the plain functions."""

from __future__ import annotations

import pytest
import torch

import moekern
import moekern.compat.deep_gemm as deep_gemm
from moekern import GroupedLayout

M, N, K = 5, 200, 320  # ragged in every direction


@pytest.fixture
def operands() -> tuple[deep_gemm.Scaled, deep_gemm.Scaled]:
    torch.manual_seed(0)
    return deep_gemm.per_token_cast_to_fp8(torch.randn(M, K)), deep_gemm.per_block_cast_to_fp8(torch.randn(N, K))


def transposed(x: deep_gemm.Scaled) -> deep_gemm.Scaled:
    return x[0].T.contiguous(), x[1].T.contiguous()


def run(gemm, a, b, **options) -> torch.Tensor:
    d = torch.full((M, N), float("nan"))
    assert gemm(a, b, d, **options) is None
    return d


@pytest.mark.parametrize("form", ["nt", "nn", "tn", "tt"])
def test_every_form_gives_the_bits_of_the_plain_function(form, operands):
    a, b = operands
    left = transposed(a) if form[0] == "t" else a
    right = transposed(b) if form[1] == "n" else b
    got = run(getattr(deep_gemm, f"fp8_gemm_{form}"), left, right)
    assert torch.equal(got, getattr(moekern, f"fp8_gemm_{form}")(left, right, out_dtype=torch.float32))
    torch.testing.assert_close(got, moekern.fp8_gemm_nt(a, b, out_dtype=torch.float32), rtol=1e-5, atol=1e-3)


def test_c_is_added_and_may_be_d(operands):
    a, b = operands
    c = torch.randn(M, N)
    expected = moekern.fp8_gemm_nt(a, b, c, out_dtype=torch.float32)
    assert torch.equal(run(deep_gemm.fp8_gemm_nt, a, b, c=c), expected)
    deep_gemm.fp8_gemm_nt(a, b, c, c)
    assert torch.equal(c, expected)


def test_argument_order_is_deep_gemms(operands):
    a, b = operands
    d = torch.empty(M, N)
    deep_gemm.fp8_gemm_nt(a, b, d, None, (1, 128, 128), None, None, "nk", False)
    assert torch.equal(d, moekern.fp8_gemm_nt(a, b, out_dtype=torch.float32))


def test_recipes_choose_the_scale_grid_of_b(operands):
    a, _ = operands
    weights = torch.randn(N, K)
    by_row = deep_gemm.per_token_cast_to_fp8(weights)
    expected = moekern.fp8_gemm_nt(a, by_row, out_dtype=torch.float32)
    assert torch.equal(run(deep_gemm.fp8_gemm_nt, a, by_row, recipe=(1, 1, 128)), expected)
    assert torch.equal(run(deep_gemm.fp8_gemm_nt, a, by_row, recipe_a=(1, 128), recipe_b=(1, 128)), expected)
    with pytest.raises(ValueError, match="b"):
        run(deep_gemm.fp8_gemm_nt, a, by_row)  # the default takes 128 x 128 scales


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"recipe": (1, 1, 32)}, "recipe"),
        ({"recipe_a": (1, 128)}, "recipe_b"),
        ({"recipe_a": (1, 128), "recipe_b": (1, 32)}, "recipe_b"),
        ({"recipe": (1, 128, 128), "recipe_a": (1, 128), "recipe_b": (128, 128)}, "recipe"),
    ],
)
def test_an_unsupported_recipe_is_named(options, named, operands):
    with pytest.raises(ValueError, match=named):
        run(deep_gemm.fp8_gemm_nt, *operands, **options)


def test_scales_may_be_mn_major(operands):
    a, b = operands
    sfa = deep_gemm.get_mn_major_tma_aligned_tensor(a[1])
    assert sfa.stride() == (1, 8) and torch.equal(sfa, a[1])
    assert torch.equal(run(deep_gemm.fp8_gemm_nt, (a[0], sfa), b), run(deep_gemm.fp8_gemm_nt, a, b))


def test_aligning_twice_copies_once():
    sf = torch.rand(3, 6, 7)
    aligned = deep_gemm.get_col_major_tma_aligned_tensor(sf)
    assert aligned.stride() == (8 * 7, 1, 8) and torch.equal(aligned, sf)
    assert deep_gemm.get_col_major_tma_aligned_tensor(aligned) is aligned


def test_four_ue8m0_in_an_int32(operands):
    a = deep_gemm.per_token_cast_to_fp8(torch.randn(M, K), use_ue8m0=True)
    b = deep_gemm.per_token_cast_to_fp8(torch.randn(N, K), use_ue8m0=True)

    def packed(sf: torch.Tensor) -> torch.Tensor:
        words = torch.zeros(sf.shape[0], 4, dtype=torch.uint8)
        words[:, : sf.shape[1]] = sf.to(torch.float8_e8m0fnu).view(torch.uint8)
        return deep_gemm.get_mn_major_tma_aligned_tensor(words.view(torch.int32))

    got = run(deep_gemm.fp8_gemm_nt, (a[0], packed(a[1])), (b[0], packed(b[1])))
    assert torch.equal(got, moekern.fp8_gemm_nt(a, b, out_dtype=torch.float32))
    with pytest.raises(ValueError, match="int32 scale of b"):
        run(deep_gemm.fp8_gemm_nt, a, (b[0], packed(b[1]).repeat(1, 2)))


def test_the_2025_names(operands):
    a, b = operands
    out = torch.empty(M, N, dtype=torch.bfloat16)
    deep_gemm.gemm_fp8_fp8_bf16_nt(a, b, out)
    assert torch.equal(out, moekern.fp8_gemm_nt(a, b))
    with pytest.raises(TypeError, match="out"):
        deep_gemm.gemm_fp8_fp8_bf16_nt(a, b, out.float())

    by_row = deep_gemm.per_token_cast_to_fp8(torch.randn(N, K))
    total = torch.randn(M, N)
    expected = moekern.fp8_gemm_nt(a, by_row, total, out_dtype=torch.float32)
    deep_gemm.wgrad_gemm_fp8_fp8_fp32_nt(a, by_row, total)
    assert torch.equal(total, expected)
    with pytest.raises(TypeError, match="out"):
        deep_gemm.wgrad_gemm_fp8_fp8_fp32_nt(a, by_row, out)


@pytest.mark.parametrize("name", ["per_token_cast_to_fp8", "per_block_cast_to_fp8", "per_channel_cast_to_fp8"])
@pytest.mark.parametrize("use_ue8m0", [False, True])
def test_casts(name, use_ue8m0):
    x = torch.randn(150, 300)
    q, s = getattr(deep_gemm, name)(x, use_ue8m0)
    expected = getattr(moekern, name)(x, round_scale_up=use_ue8m0)
    assert torch.equal(q.view(torch.uint8), expected.data.view(torch.uint8)) and torch.equal(s, expected.scale)
    assert not use_ue8m0 or (torch.frexp(s).mantissa == 0.5).all()
    with pytest.raises(ValueError, match="gran_k"):
        getattr(deep_gemm, name)(x, use_ue8m0, 32)


def test_num_sms_is_the_number_of_threads():
    with moekern.use():
        deep_gemm.set_num_sms(1)
        assert deep_gemm.get_num_sms() == 1
        with pytest.raises(ValueError, match="num_sms"):
            deep_gemm.set_num_sms(1 << 20)
    assert deep_gemm.get_num_sms() == torch.get_num_threads()


def test_calc_diff():
    x = torch.tensor([1.0, 2.0])
    assert deep_gemm.calc_diff(x, x) == 0 and deep_gemm.calc_diff(x * 0, x * 0) == 0
    assert deep_gemm.calc_diff(x, -x) == 2
    assert deep_gemm.calc_diff(x, 2 * x) == pytest.approx(1 - 2 * 10 / 25)


def test_alignments():
    assert deep_gemm.ceil_div(129, 128) == 2
    assert deep_gemm.get_tma_aligned_size(5, 4) == 8
    for name in ("m", "k", "mk"):
        assert getattr(deep_gemm, f"get_{name}_alignment_for_contiguous_layout")() == 128


# ---- grouped -----------------------------------------------------------------------------------------

COUNTS = (3, 0, 130, 7)


@pytest.fixture
def alignment():
    """Whatever a test sets, the next one finds the default."""
    yield deep_gemm.get_mk_alignment_for_contiguous_layout()
    deep_gemm.set_mk_alignment_for_contiguous_layout(128)


def stacked(x: list[deep_gemm.Scaled]) -> deep_gemm.Scaled:
    data = torch.stack([q.view(torch.uint8) for q, _ in x]).view(torch.float8_e4m3fn)
    return data, torch.stack([s for _, s in x])


@pytest.fixture
def experts() -> deep_gemm.Scaled:
    torch.manual_seed(1)
    return stacked([deep_gemm.per_block_cast_to_fp8(torch.randn(N, K)) for _ in COUNTS])


def contiguous(align: int) -> tuple[deep_gemm.Scaled, GroupedLayout]:
    layout = GroupedLayout.from_counts(COUNTS, align)
    x = torch.randn(layout.rows, K)
    return deep_gemm.per_token_cast_to_fp8(x), layout


@pytest.mark.parametrize("align", [1, 64, 128])
def test_m_indices(align, experts):
    """Labels at any alignment, also at one that DeepGEMM's tiles of 128 rows would get wrong."""
    a, layout = contiguous(align)
    d = torch.full((layout.rows, N), 5.0, dtype=torch.bfloat16)
    assert deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, experts, d, layout.indices()) is None
    expected = moekern.m_grouped_fp8_gemm_nt_contiguous(a, experts, layout)
    owned = layout.indices() >= 0
    assert torch.equal(d[owned], expected[owned]) and (d[~owned] == 5).all()

    again = torch.zeros_like(d)
    deep_gemm.m_grouped_fp8_gemm_nn_contiguous(a, (experts[0].mT, experts[1].mT), again, layout.indices())
    assert torch.equal(again[owned], d[owned])
    again.zero_()
    deep_gemm.m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(a, experts, again, layout.indices())
    assert torch.equal(again[owned], d[owned])
    with pytest.raises(TypeError, match="out"):
        deep_gemm.m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(a, experts, again.float(), layout.indices())
    with pytest.raises(ValueError, match="groups must ascend"):
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, experts, d, layout.indices().flip(0))


@pytest.mark.parametrize("align", [16, 128])
def test_psum_layout(align, experts, alignment):
    deep_gemm.set_mk_alignment_for_contiguous_layout(align)
    assert deep_gemm.get_mk_alignment_for_contiguous_layout() == align
    a, layout = contiguous(align)
    ends = torch.tensor([rows.stop for rows in layout.slices()], dtype=torch.int32)
    expected = moekern.m_grouped_fp8_gemm_nt_contiguous(a, experts, layout, out_dtype=torch.float32)
    owned = layout.indices() >= 0
    for zeros in (True, False):
        d = torch.full((layout.rows, N), 5.0)
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
            a, experts, d, ends, use_psum_layout=True, ensure_zero_padding=zeros, expected_m_for_psum_layout=3
        )
        assert torch.equal(d[owned], expected[owned]) and (d[~owned] == (0 if zeros else 5)).all()


def test_masked_m(experts):
    a = stacked([deep_gemm.per_token_cast_to_fp8(torch.randn(140, K)) for _ in COUNTS])
    masked_m = torch.tensor(COUNTS, dtype=torch.int32)
    d = torch.full((len(COUNTS), 140, N), 5.0, dtype=torch.bfloat16)
    deep_gemm.m_grouped_fp8_gemm_nt_masked(a, experts, d, masked_m, 1)  # fewer expected than come
    for g, count in enumerate(COUNTS):
        one = (a[0][g, :count], a[1][g, :count]), (experts[0][g], experts[1][g])
        torch.testing.assert_close(d[g, :count], moekern.fp8_gemm_nt(*one), rtol=1e-2, atol=1e-2)
        assert (d[g, count:] == 5).all()
    for name in ("fp8_m_grouped_gemm_nt_masked", "m_grouped_gemm_fp8_fp8_bf16_nt_masked"):
        again = torch.full_like(d, 5.0)
        getattr(deep_gemm, name)(a, experts, again, masked_m, 140)
        assert torch.equal(again, d)
    with pytest.raises(ValueError, match=r"counts\[2\] is 130; the capacity of a group is 129"):
        deep_gemm.m_grouped_fp8_gemm_nt_masked((a[0][:, :129], a[1][:, :129]), experts, d[:, :129], masked_m, 1)


def test_grouped_scales_of_four_ue8m0_in_an_int32():
    def packed(sf: torch.Tensor) -> torch.Tensor:
        words = torch.zeros(*sf.shape[:-1], 4, dtype=torch.uint8)
        words[..., : sf.shape[-1]] = sf.to(torch.float8_e8m0fnu).view(torch.uint8)
        return deep_gemm.get_mn_major_tma_aligned_tensor(words.view(torch.int32))

    a = stacked([deep_gemm.per_token_cast_to_fp8(torch.randn(9, K), use_ue8m0=True) for _ in COUNTS])
    b = stacked([deep_gemm.per_token_cast_to_fp8(torch.randn(N, K), use_ue8m0=True) for _ in COUNTS])
    masked_m = torch.tensor([9, 0, 1, 5])
    d = torch.zeros(len(COUNTS), 9, N)
    deep_gemm.m_grouped_fp8_gemm_nt_masked((a[0], packed(a[1])), (b[0], packed(b[1])), d, masked_m, 9)
    expected = moekern.m_grouped_fp8_gemm_nt_masked(
        a, b, GroupedLayout.from_masked(masked_m, 9), out_dtype=torch.float32
    )
    assert torch.equal(d, expected)
    with pytest.raises(ValueError, match="m_grouped_fp8_gemm_nt_masked: the int32 scale of b"):
        deep_gemm.m_grouped_fp8_gemm_nt_masked(a, (b[0], packed(b[1])[:, :-1]), d, masked_m, 9)


@pytest.mark.parametrize("c", ["none", "d", "another"])
def test_k_grouped(c):
    ks = [128, 0, 256]
    x, y = torch.randn(sum(ks), M), torch.randn(sum(ks), N)
    a, b = deep_gemm.per_channel_cast_to_fp8(x), deep_gemm.per_channel_cast_to_fp8(y)
    d, sums = torch.randn(len(ks), M, N), torch.randn(len(ks), M, N)
    addend = {"none": None, "d": d, "another": sums}[c]
    expected = moekern.k_grouped_fp8_gemm_tn_contiguous(a, b, GroupedLayout.from_counts(ks), addend)
    deep_gemm.k_grouped_fp8_gemm_tn_contiguous(a, b, d, ks, torch.tensor(ks, dtype=torch.int32), addend)
    assert torch.equal(d, expected)
    if c == "none":
        return
    with pytest.raises(ValueError, match="layout has the first row of group 1 at 100"):
        deep_gemm.k_grouped_fp8_gemm_tn_contiguous(a, b, d, [100, 28, 256], None, addend)
    with pytest.raises(ValueError, match="recipe"):
        deep_gemm.k_grouped_fp8_gemm_tn_contiguous(a, b, d, ks, None, addend, recipe=(1, 1, 32))
    with pytest.raises(TypeError, match="scale of a"):
        deep_gemm.k_grouped_fp8_gemm_tn_contiguous((a[0], a[1].int()), b, d, ks, None, addend)


def test_k_grouped_psum_layout(alignment):
    """Groups of any number of rows, each starting at a multiple of 128."""
    layout = GroupedLayout.from_counts([100, 0, 129], 128)
    a = deep_gemm.per_channel_cast_to_fp8(torch.randn(layout.rows, M))
    b = deep_gemm.per_channel_cast_to_fp8(torch.randn(layout.rows, N))
    ends = torch.tensor([rows.stop for rows in layout.slices()], dtype=torch.int32)
    d = torch.empty(3, M, N)
    deep_gemm.k_grouped_fp8_gemm_tn_contiguous(a, b, d, None, ends, use_psum_layout=True)
    assert torch.equal(d, moekern.k_grouped_fp8_gemm_tn_contiguous(a, b, layout))


def test_a_missing_d_is_named(experts):
    for call in (
        lambda: deep_gemm.m_grouped_fp8_gemm_nt_contiguous(experts, experts, None, None),
        lambda: deep_gemm.m_grouped_fp8_gemm_nt_masked(experts, experts, None, None, 1),
        lambda: deep_gemm.k_grouped_fp8_gemm_tn_contiguous(experts, experts, None, [], None),
    ):
        with pytest.raises(TypeError, match="d is None"):
            call()


def test_the_alignment_is_the_callers(alignment):
    assert alignment == 128 == deep_gemm.get_k_alignment_for_contiguous_layout()
    least = deep_gemm.get_theoretical_mk_alignment_for_contiguous_layout(64)
    deep_gemm.set_mk_alignment_for_contiguous_layout(least)
    assert deep_gemm.get_m_alignment_for_contiguous_layout() == least == 1
    for wrong in (0, -1, None):
        with pytest.raises(ValueError, match="alignment"):
            deep_gemm.set_mk_alignment_for_contiguous_layout(wrong)
