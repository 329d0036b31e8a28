"""fused_experts under torch.compile, torch.export and fake tensors."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import moekern
from moekern import ExpertWeights, NotSupported, batched_experts, fused_experts
from moekern.testing import expert_cases
from moekern.testing.expert_cases import Experts

H = 150
CASE = Experts(5, H, 72, 4, 2, x="f32", shared=1, bias="f32")
STACK = expert_cases.operands(CASE)
SEPARATE = expert_cases.operands(Experts(5, H, 72, 4, 2, x="f32", form="separate"))


def tokens(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    p = expert_cases.operands(Experts(count, H, 72, 4, 2, x="f32", routing="skips"))
    return p.x.contiguous(), p.ids.contiguous(), p.weights.contiguous()


def stacked(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return fused_experts(x, STACK.experts, ids, weights, shared=STACK.options["shared"], limit=3) + 1


def separate(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return fused_experts(x.to(torch.bfloat16), SEPARATE.experts, ids, weights, quantize_activations=True)


def fp8(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    scaled = moekern.per_token_cast_to_fp8(x)
    return fused_experts(scaled, STACK.experts, ids, weights, reduce=False, activation="gelu", out_dtype=torch.float32)


def into(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    workspace = torch.zeros(1 << 20, dtype=torch.uint8)
    return fused_experts(x, STACK.experts, ids, weights, out=out, workspace=workspace) * 2


def made_inside(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    (gate_up, _), _, (down, _) = STACK.experts.projections()[0]
    experts = ExpertWeights([(gate_up.data, gate_up.scale)], [(down.data, down.scale)])
    return fused_experts(x, experts, torch.where(ids < 0, ids, 0), weights)


def batched(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    counts = torch.arange(4) % 3
    return batched_experts(x.unsqueeze(0).expand(4, -1, -1), STACK.experts, counts.clamp(max=x.shape[0]))


MODELS = [stacked, separate, fp8, into, made_inside, batched]
Model = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("model", MODELS)
def test_compile_without_graph_breaks(model: Model) -> None:
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    operands = tokens(5)
    torch.testing.assert_close(compiled(*operands), model(*operands), rtol=0, atol=0)


@pytest.mark.parametrize("model", MODELS)
def test_one_graph_for_every_number_of_tokens(model: Model) -> None:
    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for count in (7, 3, 64, 130):
        operands = tokens(count)
        torch.testing.assert_close(compiled(*operands), model(*operands), rtol=0, atol=0)
    assert graphs == 1


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor() -> None:
    operands = tokens(5)
    compiled = torch.compile(stacked, fullgraph=True)
    torch.testing.assert_close(compiled(*operands), stacked(*operands), rtol=1e-6, atol=1e-6)


def test_compiled_calls_find_the_experts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator gets tensors; it does not check and tabulate all of them for every call."""
    compiled = torch.compile(stacked, fullgraph=True, backend="aot_eager")
    compiled(*tokens(5))

    def never(*arguments: Any) -> Any:
        raise AssertionError("the experts were made anew")

    monkeypatch.setattr(ExpertWeights, "from_tensors", never)
    compiled(*tokens(5))


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = STACK.experts

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return fused_experts(x, self.experts, ids, weights)


def test_export_with_a_dynamic_batch() -> None:
    rows = {0: torch.export.Dim("t", min=1, max=4096)}
    program = torch.export.export(Layer(), tokens(5), dynamic_shapes=(rows, rows, rows))
    for count in (2, 5, 90):
        assert torch.equal(program.module()(*tokens(count)), Layer()(*tokens(count)))
    assert any(node.target is torch.ops.moekern.fused_experts.default for node in program.graph.nodes)


def test_fake_tensors() -> None:
    operands = tokens(5)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, ids, weights = (mode.from_tensor(t) for t in operands)
        out = fused_experts(x, STACK.experts, ids, weights)
        assert out.shape == (5, H) and out.dtype == torch.float32
        assert fused_experts(x, STACK.experts, ids, weights, reduce=False).shape == (10, H)
        scaled = moekern.per_token_cast_to_fp8(x)
        assert fused_experts(scaled, STACK.experts, ids, weights).dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match="same number of rows"):
            fused_experts(x[1:], STACK.experts, ids, weights)


def test_experts_of_fake_tensors_cannot_be_read() -> None:
    with FakeTensorMode() as mode:
        tensors = [mode.from_tensor(t) for t in STACK.experts.tensors]
        fake = ExpertWeights.from_tensors(tensors, STACK.experts.layout)
    with pytest.raises(TypeError, match="experts was made of fake tensors"):
        fused_experts(*tokens(5)[:1], fake, *tokens(5)[1:])


@pytest.mark.parametrize("x", ["f32", "e4m3fn"])
def test_opcheck(x: str) -> None:
    p = expert_cases.operands(Experts(5, H, 72, 4, 2, x=x, shared=1))
    data, scale, block = (p.x, None, [1, 1]) if isinstance(p.x, torch.Tensor) else (*p.x, [1, 128])
    shared = p.options["shared"]
    operands = (data, scale, block, p.experts.tensors, list(p.experts.layout), shared.tensors, list(shared.layout))
    arguments = (*operands, p.ids, p.weights, None, "swiglu", 1.0, 0.0, None, False, False, True, None)
    torch.library.opcheck(
        torch.ops.moekern.fused_experts.default,
        arguments,
        test_utils=("test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic"),
    )


def test_there_is_no_gradient() -> None:
    x, ids, weights = tokens(5)
    out = stacked(x.requires_grad_(), ids, weights)
    assert torch.equal(out, stacked(x.detach(), ids, weights))
    with pytest.raises(NotSupported, match="no gradient"):
        out.sum().backward()
    with torch.no_grad():
        assert not stacked(x, ids, weights).requires_grad


def test_weights_are_described_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a graph that describes them itself, and again only where they are in other memory."""
    described = 0
    from_tensors = ExpertWeights.from_tensors

    def counted(*arguments: Any) -> ExpertWeights:
        nonlocal described
        described += 1
        return from_tensors(*arguments)

    monkeypatch.setattr(ExpertWeights, "from_tensors", counted)
    p = expert_cases.operands(Experts(5, H, 72, 4, 2, x="f32"))
    data, scale = p.experts.tensors[0].clone(), p.experts.tensors[1].clone()
    other = data.flip(0), scale.flip(0)
    down = p.experts.tensors[2], p.experts.tensors[3]

    def model(x: torch.Tensor, data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return fused_experts(x, ExpertWeights((data, scale), down), p.ids, p.weights)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for operands, count in (((data, scale), 1), ((data, scale), 1), (other, 2), ((data, scale), 2)):
        torch.testing.assert_close(compiled(p.x, *operands), model(p.x, *operands), rtol=0, atol=0)
        assert described == count
    scale.mul_(2)  # in place: the same description of other values
    torch.testing.assert_close(compiled(p.x, data, scale), model(p.x, data, scale), rtol=0, atol=0)
    assert described == 2
