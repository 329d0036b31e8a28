"""moekern.compat.deep_gemm against the plain functions."""

from __future__ import annotations

import pytest
import torch

import moekern
import moekern.compat.deep_gemm as deep_gemm

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
