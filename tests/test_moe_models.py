"""The reference layers: their sizes, routings and weights, and every layer scaled down through fused_experts."""

from __future__ import annotations

import pytest
import torch

import moekern
from moekern import fused_experts
from moekern.testing import moe_models
from moekern.testing.expert_numerics import experts_oracle
from moekern.testing.moe_models import LAYERS, MoeLayer, random_experts, routing, shared_experts
from moekern.testing.numerics import check_bound

each_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())


@pytest.mark.parametrize(
    ("name", "parameters"),  # of one layer's routed experts, from the models' papers and cards
    [("deepseek-v3", 11.27e9), ("qwen3-30b-a3b", 0.604e9), ("mixtral-8x7b", 1.41e9), ("gpt-oss-like", 0.796e9)],
)
def test_sizes(name: str, parameters: float) -> None:
    layer = LAYERS[name]
    count = 3 * layer.hidden * layer.intermediate * layer.experts
    assert count == pytest.approx(parameters, rel=0.005)
    assert count < layer.expert_bytes * layer.experts < 1.0005 * count


@each_layer
@pytest.mark.parametrize("quantize", [False, True])
def test_scaled_down(layer: MoeLayer, quantize: bool) -> None:
    small = layer.scaled_down(16, experts=12)
    x = torch.randn(21, small.hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
    experts, shared = random_experts(small), shared_experts(small)
    assert (shared is None) == (layer.shared == 0)
    ids, weights = routing(21, 12, small.top_k, scaling=layer.scaling)
    options = {**layer.options, "shared": shared, "quantize_activations": quantize}
    got = fused_experts(x, experts, ids, weights, **options)
    oracle = experts_oracle(x, experts, ids, weights, **options)
    check_bound(got, oracle)
    assert torch.equal(moe_models.forward(layer, x, experts, ids, weights, shared, quantize), oracle.reference)
    assert oracle.reference.abs().max() > 1e-4, "nothing to compare"


@pytest.mark.parametrize("skew", [0.0, 1.0, 2.0])
def test_routing(skew: float) -> None:
    ids, weights = routing(3000, 64, 6, skew, scaling=2.5)
    assert ids.dtype == torch.int64 and weights.dtype == torch.float32
    assert all(len(set(row)) == 6 for row in ids.tolist()) and ids.min() == 0 and ids.max() == 63
    torch.testing.assert_close(weights.sum(1), torch.full((3000,), 2.5))
    share = torch.bincount(ids.flatten(), minlength=64).sort(descending=True).values / 18000
    if skew == 0:
        assert share[0] < 1.2 / 64 and share[-1] > 0.8 / 64
    else:  # nobody gets more than one of a token's six
        assert share[0] > 5 * share[20] and share[0] <= 1 / 6
    again, _ = routing(3000, 64, 6, skew, scaling=2.5)
    other, _ = routing(3000, 64, 6, skew, scaling=2.5, seed=1)
    assert torch.equal(again, ids) and not torch.equal(other, ids)


def test_random_weights_are_like_trained_ones() -> None:
    experts = random_experts(LAYERS["qwen3-30b-a3b"].scaled_down(4, experts=3))
    values = torch.cat([experts.expert(e).gate.flatten() for e in range(3)])
    assert values.std().item() == pytest.approx(moe_models.WEIGHT_SIGMA, rel=0.15)
    assert values.abs().mean().item() == pytest.approx(0.8 * values.std().item(), rel=0.1)  # sqrt(2 / pi) of a Gaussian
    assert len({tuple(experts.expert(e).gate[0, :16].tolist()) for e in range(3)}) == 3
    down = moekern.dequantize(experts.projections()[2][2][0])
    assert not torch.equal(down[0], down[1])
