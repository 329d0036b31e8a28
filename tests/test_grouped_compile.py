"""The grouped products under torch.compile, torch.export, fake tensors and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import moekern
from moekern import GroupedLayout, GroupedWeights, ScaledTensor

G, N, K = 3, 70, 200
COUNTS = (4, 0, 19)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def weights() -> list[ScaledTensor]:
    return [moekern.per_block_cast_to_fp8(rand(N, K) + g) for g in range(G)]


def stack() -> ScaledTensor:
    found = weights()
    data = torch.stack([w.data.view(torch.uint8) for w in found]).view(torch.float8_e4m3fn)
    return ScaledTensor(data, torch.stack([w.scale for w in found]))


def contiguous(x: torch.Tensor, b: Any, counts: torch.Tensor) -> torch.Tensor:
    layout = GroupedLayout.from_counts(counts, rows=x.shape[0])
    return moekern.m_grouped_fp8_gemm_nt_contiguous(x, b, layout) * 2


def contiguous_w8a8(x: torch.Tensor, b: Any, counts: torch.Tensor) -> torch.Tensor:
    layout = GroupedLayout.from_ends(counts.cumsum(0), rows=x.shape[0])
    return moekern.m_grouped_fp8_gemm_nt_contiguous(moekern.per_token_cast_to_fp8(x), b, layout) + 1


def into(x: torch.Tensor, b: Any, counts: torch.Tensor) -> torch.Tensor:
    out = torch.full((x.shape[0], N), 5.0)
    layout = GroupedLayout.from_counts(counts, rows=x.shape[0])
    return moekern.m_grouped_fp8_gemm_nt_contiguous(x, b, layout, out=out) * 2


def masked(x: torch.Tensor, b: Any, counts: torch.Tensor) -> torch.Tensor:
    layout = GroupedLayout.from_masked(counts, x.shape[0])
    slots = x.expand(G, *x.shape)
    out = torch.full((G, x.shape[0], N), 5.0)
    return moekern.m_grouped_fp8_gemm_nt_masked(slots, b, layout) + moekern.m_grouped_fp8_gemm_nt_masked(
        slots, b, layout, out=out
    )


def gradient_of_weights(x: torch.Tensor, b: Any, counts: torch.Tensor) -> torch.Tensor:
    layout = GroupedLayout.from_counts(counts, 128, rows=x.shape[0])
    q = moekern.per_channel_cast_to_fp8(x)
    sums = torch.ones(G, K, K)
    total = moekern.k_grouped_fp8_gemm_tn_contiguous(q, q, layout, c=sums, out=sums)
    return total + moekern.k_grouped_fp8_gemm_tn_contiguous(x, q, layout)


MODELS = [contiguous, contiguous_w8a8, into, masked, gradient_of_weights]
ROWS = 300


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("form", ["stack", "list", "GroupedWeights"])
@pytest.mark.parametrize("model", MODELS)
def test_compile_without_graph_breaks(model: Callable[..., torch.Tensor], form: str) -> None:
    b: Any = {"stack": stack, "list": weights, "GroupedWeights": lambda: GroupedWeights(weights())}[form]()
    x, counts = rand(ROWS, K), torch.tensor(COUNTS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, b, counts), model(x, b, counts), rtol=0, atol=0)


@pytest.mark.parametrize("model", MODELS)
def test_one_graph_for_every_number_of_rows(model: Callable[..., torch.Tensor]) -> None:
    b, graphs = stack(), 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for rows, counts in ((300, (4, 0, 19)), (257, (0, 1, 100)), (400, (0, 0, 0)), (391, (40, 50, 60))):
        x, c = rand(rows, K), torch.tensor(counts)
        torch.testing.assert_close(compiled(x, b, c), model(x, b, c), rtol=0, atol=0)
    assert graphs == 1


def test_a_layout_made_outside_the_graph() -> None:
    b, x = stack(), rand(23, K)
    layout = GroupedLayout.from_counts(COUNTS)

    def model(x: torch.Tensor, b: ScaledTensor, layout: GroupedLayout) -> torch.Tensor:
        return moekern.m_grouped_fp8_gemm_nt_contiguous(x, b, layout)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, b, layout), model(x, b, layout))


def test_a_compiled_graph_checks_its_layout() -> None:
    compiled = torch.compile(contiguous, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="rows is 20; group 2 starts at 4 and has 19"):
        compiled(rand(20, K), stack(), torch.tensor(COUNTS))


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        b = stack()
        self.register_buffer("weight", b.data)
        self.register_buffer("weight_scale_inv", b.scale)

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        layout = GroupedLayout.from_counts(counts, rows=x.shape[0])
        return moekern.m_grouped_fp8_gemm_nt_contiguous(x, (self.weight, self.weight_scale_inv), layout)


def test_export_with_any_number_of_rows() -> None:
    layer, counts = Layer(), torch.tensor(COUNTS)
    rows = torch.export.Dim("rows", min=1, max=4096)
    program = torch.export.export(layer, (rand(30, K), counts), dynamic_shapes=({0: rows}, None))
    for m in (23, 30, 300):
        assert torch.equal(program.module()(rand(m, K), counts), layer(rand(m, K), counts))


def test_fake_tensors() -> None:
    with FakeTensorMode() as mode:
        x, q, s, counts = (mode.from_tensor(t) for t in (rand(23, K), *stack(), torch.tensor(COUNTS)))
        layout = GroupedLayout.from_counts(counts, rows=23)
        got = moekern.m_grouped_fp8_gemm_nt_contiguous(x.half(), (q, s), layout)
        assert got.shape == (23, N) and got.dtype == torch.float16
        slots = x.expand(G, 23, K)
        got = moekern.m_grouped_fp8_gemm_nt_masked(slots, (q, s), GroupedLayout.from_masked(counts, 23))
        assert got.shape == (G, 23, N) and got.dtype == torch.float32
        b = moekern.per_channel_cast_to_fp8(x)
        assert moekern.k_grouped_fp8_gemm_tn_contiguous(x, b, layout).shape == (G, K, K)
        with pytest.raises(RuntimeError, match="same number of columns"):
            moekern.m_grouped_fp8_gemm_nt_contiguous(x[:, 1:], (q, s), layout)


CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("form", ["stack", "list"])
@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(form: str, gradient: bool) -> None:
    q, s = stack()
    b, sb = ([q], [s]) if form == "stack" else (list(q.unbind()), list(s.unbind()))
    layout = GroupedLayout.from_counts(COUNTS, rows=25)
    rows = [b, sb, [128, 128], layout.starts, layout.counts]
    ops = torch.ops.moekern
    x = rand(25, K).requires_grad_(gradient)
    torch.library.opcheck(
        ops.m_grouped_fp8_gemm_nt_contiguous.default, (x, None, [1, 1], *rows, 25, None, None), test_utils=CHECKS
    )
    layout = GroupedLayout.from_masked(COUNTS, 20)
    rows = [b, sb, [128, 128], layout.starts, layout.counts]
    x = rand(G, 20, K).requires_grad_(gradient)
    torch.library.opcheck(
        ops.m_grouped_fp8_gemm_nt_masked.default, (x, None, [1, 1], *rows, 60, 20, torch.float32), test_utils=CHECKS
    )


def test_opcheck_k_grouped() -> None:
    q = moekern.per_channel_cast_to_fp8(rand(300, K))
    layout = GroupedLayout.from_counts((128, 0, 40), rows=300)
    args = (rand(300, N), None, [1, 1], q.data, q.scale, [128, 1], layout.starts, layout.counts, 300, None, None)
    torch.library.opcheck(torch.ops.moekern.k_grouped_fp8_gemm_tn_contiguous.default, args, test_utils=CHECKS[1:])


@pytest.mark.parametrize("form", ["stack", "GroupedWeights"])
def test_gradients(form: str) -> None:
    """dA[i] = dD[i] B[g], against float64 autograd; zero where a row belongs to no group."""
    b: Any = stack() if form == "stack" else GroupedWeights(weights())
    layout = GroupedLayout.from_counts(COUNTS, 16)
    x = rand(layout.rows, K)
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    upstream = rand(layout.rows, N)
    moekern.m_grouped_fp8_gemm_nt_contiguous(ours, b, layout).backward(upstream)
    expected = torch.cat([exact[rows] @ b.group(g).to_float64().T for g, rows in enumerate(layout.slices())])
    owned = layout.indices() >= 0
    expected.backward(upstream[owned].double())
    assert ours.grad is not None and exact.grad is not None
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)
    assert (ours.grad[~owned] == 0).all()

    slots = rand(G, 20, K).requires_grad_()
    layout = GroupedLayout.from_masked(COUNTS, 20)
    moekern.m_grouped_fp8_gemm_nt_masked(slots, b, layout).sum().backward()
    assert slots.grad is not None
    ones = torch.ones(1, N, dtype=torch.float64)
    for g, count in enumerate(COUNTS):
        expected = (ones @ b.group(g).to_float64()).expand(count, K)
        torch.testing.assert_close(slots.grad[g, :count].double(), expected, rtol=1e-4, atol=1e-4)
        assert (slots.grad[g, count:] == 0).all()
