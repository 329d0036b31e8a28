"""Mixture-of-Experts layers of published models: their sizes, random weights for them, and routings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from moekern.experts import ExpertWeights
from moekern.ops import fused_experts, per_token_cast_to_fp8
from moekern.scaled import BLOCK

WEIGHT_SIGMA = 0.02  # of trained layers, about
# Gaussian values repeat with this period, a product of two primes: no row of any matrix equals another.
PATTERN = (1021, 8209)


@dataclass(frozen=True)
class MoeLayer:
    """One layer: its experts, and how its router scores and chooses them."""

    model: str
    source: str  # where the sizes are published
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    shared: int = 0  # experts that every token goes to
    scoring: str = "softmax"  # or "sigmoid"
    renormalise: bool = True  # weights of the chosen add up to 1, before `scaling`
    scaling: float = 1.0
    groups: int = 1  # of experts, of which `kept_groups` may be chosen from
    kept_groups: int = 1
    correction_bias: bool = False  # added to the scores for choosing only
    biases: bool = False
    interleaved: bool = False
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What `fused_experts` is told beside operands."""
        return {"alpha": self.alpha, "beta": self.beta, "limit": self.limit}

    @property
    def expert_bytes(self) -> int:
        """FP8 weights and float32 scales of one expert."""
        rows, columns = -(-self.intermediate // BLOCK), -(-self.hidden // BLOCK)
        return 3 * self.intermediate * self.hidden + 4 * (-(-2 * self.intermediate // BLOCK) + rows) * columns

    def scaled_down(self, divisor: int, experts: int | None = None) -> MoeLayer:
        """The same layer with sizes divided: as ragged against blocks as it comes out, as many choices as it has."""
        fewer = self.experts if experts is None else experts
        return replace(
            self,
            hidden=self.hidden // divisor,
            intermediate=self.intermediate // divisor,
            experts=fewer,
            top_k=min(self.top_k, fewer),
        )


DEEPSEEK_V3 = MoeLayer(
    "DeepSeek-V3",
    "huggingface.co/deepseek-ai/DeepSeek-V3, config.json",
    hidden=7168,
    intermediate=2048,
    experts=256,
    top_k=8,
    shared=1,
    scoring="sigmoid",
    scaling=2.5,
    groups=8,
    kept_groups=4,
    correction_bias=True,
)
QWEN3_30B_A3B = MoeLayer(
    "Qwen3-30B-A3B",
    "huggingface.co/Qwen/Qwen3-30B-A3B, config.json",
    hidden=2048,
    intermediate=768,
    experts=128,
    top_k=8,
)
MIXTRAL_8X7B = MoeLayer(
    "Mixtral-8x7B",
    "huggingface.co/mistralai/Mixtral-8x7B-v0.1, config.json",
    hidden=4096,
    intermediate=14336,
    experts=8,
    top_k=2,
)
MIXTRAL_LIKE = replace(MIXTRAL_8X7B, model="Mixtral-like", intermediate=3584)  # a quarter, as of four ranks each
GPT_OSS_LIKE = MoeLayer(
    "gpt-oss-like",
    "huggingface.co/openai/gpt-oss-20b, config.json; the activation: github.com/openai/gpt-oss, torch/model.py",
    hidden=2880,
    intermediate=2880,
    experts=32,
    top_k=4,
    biases=True,
    interleaved=True,
    alpha=1.702,
    beta=1.0,
    limit=7.0,
)
LAYERS = {
    "deepseek-v3": DEEPSEEK_V3,
    "qwen3-30b-a3b": QWEN3_30B_A3B,
    "mixtral-8x7b": MIXTRAL_8X7B,
    "mixtral-like": MIXTRAL_LIKE,
    "gpt-oss-like": GPT_OSS_LIKE,
}


# ---- routing -----------------------------------------------------------------------------------------


def routing(
    tokens: int, experts: int, top_k: int, skew: float = 0.0, scaling: float = 1.0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [T, k] int64, different within a row, and weights [T, k] float32 that add up to `scaling`.

    skew: the exponent s of Zipf's law: an expert's chance is proportional to rank^-s, with ranks at random. 0 is
        even. Sampled without replacement: the k largest of log(chance) plus Gumbel noise.
    """
    g = torch.Generator().manual_seed(seed)
    chance = torch.arange(1, experts + 1, dtype=torch.float64).pow(-skew)[torch.randperm(experts, generator=g)]
    uniform = torch.rand(tokens, experts, generator=g, dtype=torch.float64).clamp(min=1e-300)
    ids = (chance.log() - (-uniform.log()).log()).topk(top_k, dim=1).indices
    weights = torch.randn(tokens, top_k, generator=g).softmax(1) * scaling
    return ids, weights


# ---- weights -----------------------------------------------------------------------------------------


def random_experts(layer: MoeLayer, seed: int = 0) -> ExpertWeights:
    """Weights of the layer's size, sigma about 0.02: gigabytes in seconds, since their codes repeat."""
    g = torch.Generator().manual_seed(seed)
    codes = Codes(g)
    biases: dict[str, Any] = {}
    if layer.biases:
        biases["b13"] = torch.randn(layer.experts, 2 * layer.intermediate, generator=g) * WEIGHT_SIGMA
        biases["b2"] = torch.randn(layer.experts, layer.hidden, generator=g) * WEIGHT_SIGMA
    return ExpertWeights(
        codes.stack(layer.experts, 2 * layer.intermediate, layer.hidden),
        codes.stack(layer.experts, layer.hidden, layer.intermediate),
        interleaved=layer.interleaved,
        **biases,
    )


def shared_experts(layer: MoeLayer, seed: int = 1) -> ExpertWeights | None:
    """Weights of the layer's shared experts, as one expert `shared` times as wide, or None."""
    if not layer.shared:
        return None
    return random_experts(replace(layer, experts=1, intermediate=layer.shared * layer.intermediate), seed)


class Codes:
    """FP8 codes of Gaussian values quantised like weights: random bytes would be subnormal or huge far too often."""

    def __init__(self, g: torch.Generator) -> None:
        self.generator = g
        self.pattern = per_token_cast_to_fp8(torch.randn(PATTERN, generator=g)).data.view(torch.uint8).flatten()
        self.place = 0

    def fill(self, out: torch.Tensor) -> torch.Tensor:
        """Codes for a contiguous FP8 tensor, going on where the last one ended."""
        flat = out.view(torch.uint8).view(-1)
        at = 0
        while at < flat.numel():
            part = self.pattern[self.place : self.place + flat.numel() - at]
            flat[at : at + part.numel()] = part
            at += part.numel()
            self.place = (self.place + part.numel()) % self.pattern.numel()
        return out

    def scales(self, *shape: int) -> torch.Tensor:
        """Decode multipliers that bring the codes, whose 448 is about 2.7 sigma, to the weights' sigma."""
        return WEIGHT_SIGMA / 170 * (0.5 + torch.rand(shape, generator=self.generator))

    def stack(self, experts: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        data = self.fill(torch.empty(experts, rows, columns, dtype=torch.float8_e4m3fn))
        return data, self.scales(experts, -(-rows // BLOCK), -(-columns // BLOCK))


def forward(
    layer: MoeLayer,
    x: torch.Tensor,
    experts: ExpertWeights,
    ids: torch.Tensor,
    weights: torch.Tensor,
    shared: ExpertWeights | None = None,
    quantize_activations: bool = False,
) -> torch.Tensor:
    """The layer in float64 for a given routing: near-equal scores would choose other experts from rounding alone."""
    options = {**layer.options, "shared": shared, "quantize_activations": quantize_activations}
    return fused_experts.reference(x, experts, ids, weights, **options)
