"""onnxruntime's own operators for experts: com.microsoft MoE and QMoE.

Both choose by scores of their own, whose softmax over the chosen is the weight of each: they get log(share), and their
result is multiplied by the sum of shares. gate and up are the even and odd rows of one matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moekern.onnx.experts import Expert, Network, Projection
from moekern.onnx.graph import DTYPES, FLOAT, UINT8, Graph, Value
from moekern.onnx.weights import around_128, half, in_steps
from moekern.op import NotSupported

DOMAIN = "com.microsoft"
_BLOCK = 64  # QMoE quantises activations in blocks of the same size: 1.5e-2 off, with 128 2.1e-2
_NEVER = -6e4  # a score whose softmax is 0, within float16


def mixture(graph: Graph, network: Network, rows: Value, shares: Value, topk: int, experts: list[Expert]) -> Value:
    """sum_e shares[t, e] y(e, x[t]) over the topk largest shares, none of them negative; rows [T, H]."""
    stored, gating, op = network.stored, network.gating, graph.op
    if gating.quantise or gating.activation not in ("swiglu", "silu"):
        raise NotSupported(f'{DOMAIN} has experts of silu on float activations; moe="sparse" has the others too')
    none = graph.number(0.0, stored.type)
    scores = op.Where(op.Greater(shares, none), op.Log(shares), graph.number(_NEVER, stored.type))
    options = {
        "k": topk,
        "normalize_routing_weights": 1,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,  # rows in turns: what runs on CPUs
        "activation_alpha": gating.alpha,
        "activation_beta": gating.beta,
        "swiglu_limit": gating.limit or 1e9,
    }
    quantised = stored.mode == "ort-contrib"
    up_to = _BLOCK if quantised else 1
    biases: tuple[Value | None, Value | None] = (None, None)
    if experts[0].gate.bias is not None:

        def bias(p: Projection) -> torch.Tensor:
            assert p.bias is not None
            return _filled(p.bias.to(DTYPES[stored.type]), up_to)

        biases = _merged(graph, experts, "_bias", stored.type, bias)
    if quantised:
        y = _quantised(graph, rows, scores, experts, biases, options)
    else:
        first, second = _merged(graph, experts, "", stored.type, lambda p: half(p.weight.name, p.weight.matrices[0]))
        y = graph.node(DOMAIN, "MoE", [rows, scores, first, biases[0], second, biases[1]], **options)
    return op.Mul(y, op.ReduceSum(shares, graph.ints(1), keepdims=1))


def _quantised(
    graph: Graph,
    rows: Value,
    scores: Value,
    experts: list[Expert],
    biases: tuple[Value | None, Value | None],
    options: dict[str, object],
) -> Value:
    """8 bits in blocks; sizes that are no multiple of one are filled up with zeros."""
    op, hidden = graph.op, experts[0].gate.weight.shape[1]
    missing = -hidden % _BLOCK

    def steps(p: Projection) -> torch.Tensor:
        return _filled(around_128(p.weight.matrices[0], _BLOCK).flatten(1), _BLOCK, value=128)

    def scales(p: Projection) -> torch.Tensor:
        return _filled(in_steps(p.weight.matrices[0], _BLOCK)[1], _BLOCK)

    first, second = _merged(graph, experts, "", UINT8, steps)
    first_scale, second_scale = _merged(graph, experts, "_scale_inv", FLOAT, scales)
    wide = op.Pad(rows, graph.ints(0, 0, 0, missing)) if missing else rows
    inputs = [wide, scores, first, first_scale, biases[0], second, second_scale, biases[1]]
    y = graph.node(DOMAIN, "QMoE", inputs, expert_weight_bits=8, block_size=_BLOCK, **options)
    return op.Slice(y, graph.ints(0), graph.ints(hidden), graph.ints(1)) if missing else y


def _filled(x: torch.Tensor, multiple: int, value: int = 0) -> torch.Tensor:
    """x with more rows, up to a multiple."""
    return torch.cat([x, x.new_full((-len(x) % multiple, *x.shape[1:]), value)])


def _merged(
    graph: Graph, experts: list[Expert], suffix: str, dtype: int, of: Callable[[Projection], torch.Tensor]
) -> tuple[Value, Value]:
    """What `of` makes of every expert: gate's and up's rows in turns [E, 2 I, ...], and down's [E, H, ...]."""

    def in_turns(e: Expert) -> torch.Tensor:
        return torch.stack([of(e.gate), of(e.up)], 1).flatten(0, 1)

    def down(e: Expert) -> torch.Tensor:
        return of(e.down)

    def initialiser(name: str, part: Callable[[Expert], torch.Tensor]) -> Value:
        shape = (len(experts), *part(experts[0]).shape)
        return graph.initialiser(f"{name}{suffix}", shape, dtype, lambda: torch.stack([part(e) for e in experts]))

    name = experts[0].gate.weight.name
    return initialiser(f"{name}+up", in_turns), initialiser(f"{name}+down", down)
