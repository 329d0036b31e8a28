"""nn, tn, tt: the same product as nt, from operands that lie the other way round."""

from __future__ import annotations

import pytest
import torch

import moekern
from moekern import ScaledTensor
from moekern.testing import cases
from moekern.testing.cases import Gemm


def flipped(x: torch.Tensor | ScaledTensor) -> torch.Tensor | ScaledTensor:
    """x transposed in memory: data and scales stored anew."""
    if isinstance(x, ScaledTensor):
        data = x.data.view(torch.uint8).T.contiguous().view(x.data.dtype)
        return ScaledTensor(data, x.scale.T.contiguous(), (x.block[1], x.block[0]))
    return x.T.contiguous()


@pytest.mark.parametrize("a", ["bf16", "e4m3fn"])
@pytest.mark.parametrize("m", [3, 40])
def test_forms(m: int, a: str) -> None:
    p = cases.gemm_operands(Gemm(m, 200, 300, a=a, c="f32", bias="f32"))
    options = {"c": p.c, "bias": p.bias, "out_dtype": torch.float32}
    reference = moekern.fp8_gemm_nt.reference(p.a, p.b, p.c, p.bias)
    expected = moekern.fp8_gemm_nt(p.a, p.b, **options)
    torch.testing.assert_close(expected.double(), reference, rtol=1e-4, atol=1e-4)
    for result in (
        moekern.fp8_gemm_nn(p.a, flipped(p.b), **options),
        moekern.fp8_gemm_tn(flipped(p.a), flipped(p.b), **options),
        moekern.fp8_gemm_tt(flipped(p.a), p.b, **options),
    ):
        torch.testing.assert_close(result.double(), reference, rtol=1e-4, atol=1e-4)


def test_pairs_stand_for_scaled_tensors() -> None:
    p = cases.gemm_operands(Gemm(4, 200, 300, a="e4m3fn"))
    assert isinstance(p.a, ScaledTensor)
    assert torch.equal(moekern.fp8_gemm_nt((p.a.data, p.a.scale), (p.b.data, p.b.scale)), moekern.fp8_gemm_nt(p.a, p.b))


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((), (200, 300)),
        ((1,), (200, 300)),
        ((200,), (1, 300)),
        ((200, 1), (1, 300)),
        ((200, 3), (1, 128)),
        ((2, 3), (128, 128)),
        ((2, 300), (128, 1)),
    ],
    ids=str,
)
def test_blocks_are_inferred(shape: tuple[int, ...], block: tuple[int, int]) -> None:
    x = ScaledTensor(torch.zeros(200, 300).to(torch.float8_e4m3fn), torch.ones(shape))
    grid = (-(-200 // x.block[0]), -(-300 // x.block[1]))
    assert grid == (-(-200 // block[0]), -(-300 // block[1])) and tuple(x.scale.shape) == grid
    assert x.T.shape == (300, 200) and torch.equal(x.T.to_float64(), x.to_float64().T)
