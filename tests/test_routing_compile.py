"""The routing ops under torch.compile, torch.export, fake tensors and autograd."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import moekern
from moekern import Permuted, Routing

E, TOPK, H = 24, 3, 70
DEEPSEEK = {
    "scoring": "sigmoid",
    "num_expert_group": 4,
    "topk_group": 2,
    "renormalize": True,
    "routed_scaling_factor": 2.5,
}


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


BIAS, SCALES = rand(E) * 0.1, rand(E).exp()


def experts(rows: torch.Tensor, layout: moekern.GroupedLayout) -> torch.Tensor:
    """A stand-in for the experts: row i of expert g times SCALES[g]; rows of none become 0."""
    index = torch.arange(rows.shape[0])
    group = torch.searchsorted(layout.starts + layout.counts, index, right=True).clamp(max=E - 1)
    used = (index >= layout.starts[group]) & (index < layout.starts[group] + layout.counts[group])
    return torch.where(used.unsqueeze(1), rows * SCALES[group].unsqueeze(1), 0)


def layer(logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    weights, ids = moekern.moe_gate(logits, TOPK, correction_bias=BIAS, **DEEPSEEK)
    moved = moekern.moe_permute(x, ids, E)
    return moekern.moe_unpermute(experts(moved.x, moved.layout), moved.inverse, weights)


def aligned(logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    weights, ids = moekern.moe_gate(logits, TOPK)
    moved = moekern.moe_permute(x, ids, E, alignment=16)
    return moekern.moe_unpermute(experts(moved.x, moved.layout), moved.inverse, weights, out_dtype=torch.float32)


def quantised(logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    _, ids = moekern.moe_gate(logits, TOPK, mask_value=0.0)
    q = moekern.per_token_cast_to_fp8(x)
    rows, layout, inverse = moekern.moe_permute(q, ids, E)
    return moekern.moe_unpermute(moekern.dequantize(rows), inverse) + layout.counts.sum()


def cast(logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    _, ids = moekern.moe_gate(logits, TOPK)
    rows, layout, inverse = moekern.moe_permute(x, ids, E, format="e5m2", round_scale_up=True)
    return moekern.moe_unpermute(moekern.dequantize(rows), inverse) + layout.counts.sum()


def cast_into(logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    slots = x.shape[0] * TOPK
    _, ids = moekern.moe_gate(logits, TOPK)
    codes = torch.zeros(slots, H, dtype=torch.float8_e4m3fn)
    out = Permuted(
        moekern.ScaledTensor(codes, torch.zeros(slots, 1), (1, 128)), None, torch.zeros(ids.shape, dtype=torch.int32)
    )
    rows, _, inverse = moekern.moe_permute(x, ids, E, format="e4m3fn", out=out)
    return moekern.moe_unpermute(moekern.dequantize(rows), inverse) + out.x.scale.sum() + out.inverse.sum()


def into(logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    tokens = x.shape[0]
    routing = Routing(torch.zeros(tokens, TOPK), torch.zeros(tokens, TOPK, dtype=torch.int32))
    weights, ids = moekern.moe_gate(logits, TOPK, out=routing)
    rows = Permuted(torch.zeros(tokens * TOPK + 5, H), None, torch.zeros(tokens, TOPK, dtype=torch.int32))
    moved = moekern.moe_permute(x, ids, E, out=rows)
    return moekern.moe_unpermute(moved.x * 2, moved.inverse, weights, out=torch.zeros(tokens, H)) + rows.x.sum()


MODELS = [layer, aligned, quantised, cast, cast_into, into]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("model", MODELS)
def test_compile_without_graph_breaks(model: Any) -> None:
    logits, x = rand(9, E), rand(9, H)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, x), model(logits, x), rtol=0, atol=0)


@pytest.mark.parametrize("model", MODELS)
def test_one_graph_for_every_number_of_tokens(model: Any) -> None:
    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for tokens in (7, 3, 64, 130):
        logits, x = rand(tokens, E), rand(tokens, H)
        torch.testing.assert_close(compiled(logits, x), model(logits, x), rtol=0, atol=0)
    assert graphs == 1


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor() -> None:
    logits, x = rand(9, E), rand(9, H)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(logits, x), layer(logits, x), rtol=1e-6, atol=1e-6)


class Layer(torch.nn.Module):
    def forward(self, logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return layer(logits, x)


def test_export_with_a_dynamic_batch() -> None:
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(Layer(), (rand(9, E), rand(9, H)), dynamic_shapes=({0: tokens}, {0: tokens}))
    for count in (2, 5, 300):
        logits, x = rand(count, E), rand(count, H)
        assert torch.equal(program.module()(logits, x), layer(logits, x))
    targets = {node.target for node in program.graph.nodes}
    assert {
        getattr(torch.ops.moekern, name).default for name in ("moe_gate", "moe_permute", "moe_unpermute")
    } <= targets


@pytest.mark.parametrize("alignment", [1, 16])
def test_fake_tensors_have_the_shapes_of_real_ones(alignment: int) -> None:
    logits, x = rand(9, E).half(), rand(9, 300).bfloat16()
    q = moekern.per_token_cast_to_fp8(x)
    real = moekern.moe_gate(logits, TOPK)
    moved = [moekern.moe_permute(rows, real.ids, E, alignment=alignment) for rows in (x, q)]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (logits, x, q.data, q.scale)]
        routing = moekern.moe_gate(fakes[0], TOPK)
        assert isinstance(routing, Routing) and routing.weights.dtype == torch.float32
        assert routing.ids.dtype == torch.int32 and routing.ids.shape == real.ids.shape == routing.weights.shape
        for rows, real_moved in zip((fakes[1], (fakes[2], fakes[3])), moved, strict=True):
            fake = moekern.moe_permute(rows, routing.ids, E, alignment=alignment)
            assert fake.x.shape == real_moved.x.shape and fake.layout.rows == real_moved.layout.rows
            assert fake.inverse.shape == real_moved.inverse.shape and fake.inverse.dtype == torch.int32
            assert fake.layout.counts.shape == (E,) and fake.layout.counts.dtype == torch.int64
        assert fake.x.data.dtype == torch.float8_e4m3fn and fake.x.scale.shape == moved[1].x.scale.shape
        cast = moekern.moe_permute(fakes[1], routing.ids, E, alignment=alignment, format="e5m2").x
        assert cast.shape == moved[1].x.shape and cast.scale.shape == moved[1].x.scale.shape
        assert cast.format == "e5m2" and cast.scale.dtype == torch.float32 and cast.block == (1, 128)
        back = moekern.moe_unpermute(fakes[1], routing.ids, out_dtype=torch.float16)
        assert back.shape == (9, 300) and back.dtype == torch.float16
        with pytest.raises(RuntimeError, match="same number of rows"):
            moekern.moe_permute(fakes[1][1:], routing.ids, E)


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(gradient: bool) -> None:
    logits, x = rand(9, E).requires_grad_(gradient), rand(9, H).requires_grad_(gradient)
    ops = torch.ops.moekern
    torch.library.opcheck(
        ops.moe_gate.default, (logits, TOPK, "sigmoid", BIAS, 4, 2, True, 2.5, 0.0), test_utils=CHECKS
    )
    weights, ids = moekern.moe_gate(logits, TOPK)
    ids = ids.detach()
    torch.library.opcheck(ops.moe_permute.default, (x, None, [1, 1], ids, E, 1, None, None, False), test_utils=CHECKS)
    inverse = moekern.moe_permute(x.detach(), ids, E).inverse
    y, weights = rand(9 * TOPK, H).requires_grad_(gradient), weights.detach().requires_grad_(gradient)
    torch.library.opcheck(ops.moe_unpermute.default, (y, inverse, weights, torch.float32), test_utils=CHECKS)
    torch.library.opcheck(ops.moe_unpermute.default, (y, inverse, None, None), test_utils=CHECKS)


def test_opcheck_scaled() -> None:
    data, scale = moekern.per_token_cast_to_fp8(rand(9, 300))
    ids = moekern.moe_gate(rand(9, E), TOPK).ids
    permute = torch.ops.moekern.moe_permute.default
    # test_schema multiplies its inputs, which torch cannot do with FP8 on CPU.
    torch.library.opcheck(permute, (data, scale, [1, 128], ids, E, 1, None, None, False), test_utils=CHECKS[1:])
    for gradient in (False, True):
        x = rand(9, 300).requires_grad_(gradient)
        torch.library.opcheck(permute, (x, None, [1, 1], ids, E, 1, None, "e4m3fn", True), test_utils=CHECKS)


# ---- gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, -2.5])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_gradient_of_the_logits(scoring: str, renormalize: bool, factor: float) -> None:
    logits, upstream = rand(9, E), rand(9, TOPK)
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    weights, ids = moekern.moe_gate(
        ours, TOPK, scoring=scoring, correction_bias=BIAS, renormalize=renormalize, routed_scaling_factor=factor
    )
    assert not ids.requires_grad
    weights.backward(upstream)
    scores = exact.softmax(1) if scoring == "softmax" else exact.sigmoid()
    chosen = scores.gather(1, ids.long())
    chosen = chosen / chosen.sum(1, keepdim=True) if renormalize else chosen
    (chosen * factor).backward(upstream.double())
    assert ours.grad is not None and exact.grad is not None and exact.grad.abs().max() > 0.1
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("skips", [False, True])
def test_gradients_of_rows_and_weights(skips: bool) -> None:
    x, weights, upstream = rand(9, H), rand(9, TOPK), rand(9, H)
    ids = moekern.moe_gate(rand(9, E), TOPK).ids
    if skips:
        ids[::2, 1] = -1
        ids[3] = -1
        weights[::2, 1] = torch.nan  # of slots that are left out
    ours = [t.clone().requires_grad_() for t in (x, weights)]
    moved = moekern.moe_permute(ours[0], ids, E, alignment=4)
    scales = SCALES[ids.long().clamp(min=0)]
    moekern.moe_unpermute(experts(moved.x, moved.layout), moved.inverse, ours[1]).backward(upstream)
    exact = [t.double().requires_grad_() for t in (x, weights)]
    factors = torch.where(ids < 0, 0.0, exact[1].nan_to_num() * scales)
    (factors.sum(1, keepdim=True) * exact[0]).backward(upstream.double())
    for got, expected in zip(ours, exact, strict=True):
        assert got.grad is not None and expected.grad is not None
        torch.testing.assert_close(got.grad.double(), expected.grad, rtol=1e-5, atol=1e-5)


def test_rows_of_two_tokens_add_up_their_gradients() -> None:
    """An inverse map need not be a permutation's."""
    y, inverse = rand(4, 5).requires_grad_(), torch.tensor([[0, 1], [1, -1], [1, 3]])
    moekern.moe_unpermute(y, inverse).backward(torch.ones(3, 5))
    assert y.grad is not None and torch.equal(y.grad[:, 0], torch.tensor([1.0, 3.0, 0.0, 1.0]))


def test_gradients_under_compile() -> None:
    grads = []
    for model in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaves = [rand(9, E).requires_grad_(), rand(9, H).requires_grad_()]
        model(*leaves).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=0, atol=0)


def test_no_gradient_for_quantised_rows() -> None:
    """FP8 rows are constants, and the bias is updated by other means."""
    q = moekern.per_token_cast_to_fp8(rand(9, 300))
    ids = moekern.moe_gate(rand(9, E), TOPK, correction_bias=BIAS.clone().requires_grad_()).ids
    assert not moekern.moe_permute(q, ids, E).x.data.requires_grad
    cast = moekern.moe_permute(rand(9, 300).requires_grad_(), ids, E, format="e4m3fn").x
    assert not cast.data.requires_grad and not cast.scale.requires_grad
    with torch.no_grad():
        assert not moekern.moe_unpermute(rand(27, 5).requires_grad_(), ids).requires_grad
