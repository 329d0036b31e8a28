"""A Mixture-of-Experts layer and a whole model, put together from the kernels that they call."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from devices import Device

from model import constants, exchange, passes
from model.gemm import Product
from model.products import predict
from moekern.models import Experts


@dataclass(frozen=True)
class Step:
    name: str
    kind: str  # compute, memory, or link
    seconds: float


@dataclass(frozen=True)
class Decoder:
    """DeepSeek-V3 and R1: multi-head latent attention, some dense layers, then experts."""

    title: str
    source: str
    experts: Experts
    layers: int
    dense_layers: int
    dense_intermediate: int
    heads: int
    q_rank: int
    kv_rank: int
    nope: int
    rope: int
    value: int
    vocabulary: int


DEEPSEEK_R1 = Decoder(
    "DeepSeek-R1",
    "huggingface.co/deepseek-ai/DeepSeek-R1, config.json",
    Experts(count=256, top_k=8, hidden=7168, intermediate=2048, shared=1),
    layers=61, dense_layers=3, dense_intermediate=18432, heads=128, q_rank=1536, kv_rank=512, nope=128, rope=64,
    value=128, vocabulary=129280,
)  # fmt: skip
MODELS = {"deepseek-r1": DEEPSEEK_R1}

# Of the bf16 peak and of bandwidth that attention kernels get, as published for H800 (FlashMLA) and the 910C.
ATTENTION_RATE, ATTENTION_MEMORY = 0.66, 0.85


def spread(rows: float, hit: int) -> tuple[int, ...]:
    """So many rows over so many groups as evenly as whole rows go."""
    total = max(1, round(rows))
    hit = max(1, min(hit, total))
    return tuple(total // hit + (i < total % hit) for i in range(hit))


def rows_of_experts(tokens: int, ranks: int, experts: Experts) -> tuple[int, ...]:
    """Rows of the experts of one rank that are hit, where routing is even."""
    held = max(1, experts.count // ranks)
    everyone = tokens * ranks
    hit = held * (1 - (1 - experts.top_k / experts.count) ** everyone)
    return spread(tokens * experts.top_k, max(1, round(hit)))


def of_products(device: Device, rows: tuple[int, ...], hidden: int, intermediate: int, grouped: bool) -> Iterator[Step]:
    """Gate and up, activation, down."""
    contiguous = grouped and max(rows) >= 128
    up = predict(device, Product(rows, 2 * intermediate, hidden, contiguous))
    down = predict(device, Product(rows, hidden, intermediate, contiguous))
    activation = passes.silu_mul_cast(device, sum(rows), intermediate)
    yield Step("gate and up", up.binds, up.seconds)
    yield Step("silu and cast", "memory", activation.seconds)
    yield Step("down", down.binds, down.seconds)


def experts_only(device: Device, tokens: int, experts: Experts) -> float:
    """Both products of all experts on one device, as libraries time their fused kernels."""
    rows = rows_of_experts(tokens, 1, experts)
    steps = of_products(device, rows, experts.hidden, experts.intermediate, grouped=True)
    return sum(step.seconds for step in steps if step.name != "silu and cast")


def moe_layer(device: Device, tokens: int, ranks: int, experts: Experts) -> list[Step]:
    """Of one of `ranks` ranks with so many tokens on each; the shared expert is on every rank."""
    hidden = experts.hidden
    rows = rows_of_experts(tokens, ranks, experts)
    logits = predict(device, Product((tokens,), experts.count, hidden, weight_bytes=2, out_bytes=4), "bf16")
    steps = [
        Step("router", logits.binds, logits.seconds),
        Step("gate", "memory", passes.gate(device, tokens, experts.count, experts.top_k).seconds),
        Step("cast", "memory", passes.cast(device, tokens, hidden).seconds),
    ]
    if ranks > 1:
        sent = exchange.predict(device, "dispatch", tokens, ranks, hidden, experts.top_k)
        back = exchange.predict(device, "combine", tokens, ranks, hidden, experts.top_k)
        steps.append(Step("dispatch", "link", sent.seconds))
    else:
        steps.append(Step("permute", "memory", passes.permute(device, tokens, hidden, experts.top_k).seconds))
    steps += of_products(device, rows, hidden, experts.intermediate, grouped=True)
    if ranks > 1:
        steps.append(Step("combine", "link", back.seconds))
    else:
        steps.append(Step("unpermute", "memory", passes.unpermute(device, tokens, hidden, experts.top_k).seconds))
    if experts.shared:
        alone = of_products(device, (tokens,), hidden, experts.shared * experts.intermediate, grouped=False)
        steps += [Step(f"shared, {step.name}", step.kind, step.seconds) for step in alone]
    return steps


def attention(device: Device, tokens: int, context: int, prefill: bool, decoder: Decoder) -> list[Step]:
    """Latent attention of `tokens` tokens: each of its own sequence (decode), or all of one (prefill).

    Decode keeps keys and values latent and absorbs the up-projections into the query and the output.
    """
    hidden = decoder.experts.hidden
    constant = constants.of_family(device.family)
    shapes = {
        "q_a and kv_a": (decoder.q_rank + decoder.kv_rank + decoder.rope, hidden),
        "q_b": (decoder.heads * (decoder.nope + decoder.rope), decoder.q_rank),
    }
    latent = decoder.kv_rank + decoder.rope
    if prefill:
        shapes["kv_b"] = (decoder.heads * (decoder.nope + decoder.value), decoder.kv_rank)
        pairs = tokens * context / 2
        operations = 2 * decoder.heads * (decoder.nope + decoder.rope + decoder.value) * pairs
        bytes = 2.0 * tokens * decoder.heads * 2 * (decoder.nope + decoder.rope)
    else:
        absorbed = 2 * tokens * decoder.heads * decoder.kv_rank * (decoder.nope + decoder.value)
        operations = 2 * decoder.heads * (latent + decoder.kv_rank) * tokens * context + absorbed
        bytes = 2.0 * tokens * context * latent
    shapes["o_proj"] = (hidden, decoder.heads * decoder.value)
    steps = []
    for name, (n, k) in shapes.items():
        product = predict(device, Product((tokens,), n, k))
        cast = passes.cast(device, tokens, k)
        steps.append(Step(name, product.binds, product.seconds + cast.seconds))
    compute = operations / (device.peak["bf16"].value * ATTENTION_RATE)
    memory = bytes / (device.bandwidth.value * ATTENTION_MEMORY)
    kind = "compute" if compute > memory else "memory"
    steps.append(Step("attention", kind, constant.launch + max(compute, memory)))
    return steps


@dataclass(frozen=True)
class Pass:
    """One pass of all layers over the tokens of one rank."""

    moe: list[Step]
    attention: list[Step]
    seconds: float  # every kernel after another
    hidden: float  # two halves of the tokens take turns, so that links work while cores do
    tokens: int

    @property
    def rate(self) -> float:
        """Tokens a second and device."""
        return self.tokens / self.seconds


def forward(device: Device, tokens: int, context: int, ranks: int, prefill: bool, decoder: Decoder) -> Pass:
    """Decode: a token of each of `tokens` sequences; prefill: sequences of `context` tokens, `tokens` in all."""
    moe = moe_layer(device, tokens, ranks, decoder.experts)
    attends = attention(device, tokens, context, prefill, decoder)
    dense = of_products(device, (tokens,), decoder.experts.hidden, decoder.dense_intermediate, grouped=False)
    of_moe, of_attention = (math.fsum(step.seconds for step in steps) for steps in (moe, attends))
    links = math.fsum(step.seconds for step in moe if step.kind == "link")
    last = 1 if prefill else tokens  # whose next token is asked for
    head = predict(device, Product((last,), decoder.vocabulary, decoder.experts.hidden, weight_bytes=2), "bf16")
    ends = decoder.dense_layers * (of_attention + math.fsum(step.seconds for step in dense)) + head.seconds
    sparse = decoder.layers - decoder.dense_layers
    cores = of_attention + of_moe - links
    return Pass(moe, attends, ends + sparse * (cores + links), ends + sparse * max(cores, links), tokens)


def weights_of(decoder: Decoder, ranks: int) -> float:
    """Bytes on one rank: its experts, and everything else whole."""
    experts, hidden = decoder.experts, decoder.experts.hidden
    one = 3 * hidden * experts.intermediate
    sparse = decoder.layers - decoder.dense_layers
    attends = (
        hidden * (decoder.q_rank + decoder.kv_rank + decoder.rope)
        + decoder.q_rank * decoder.heads * (decoder.nope + decoder.rope)
        + decoder.kv_rank * decoder.heads * (decoder.nope + decoder.value)
        + decoder.heads * decoder.value * hidden
    )
    of_layers = sparse * one * (max(1, experts.count // ranks) + experts.shared)
    dense = decoder.dense_layers * 3 * hidden * decoder.dense_intermediate
    return of_layers + dense + decoder.layers * attends + 2 * 2 * decoder.vocabulary * hidden
