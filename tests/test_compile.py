"""The ops under torch.compile, torch.export, fake tensors and autograd."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import moekern
from moekern import ScaledTensor

N, K = 200, 300


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def weights() -> ScaledTensor:
    return moekern.per_block_cast_to_fp8(rand(N, K))


def w8a16(x: torch.Tensor, q: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return moekern.fp8_gemm_nt(x, (q, s)) + 1


def w8a8(x: torch.Tensor, q: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return moekern.fp8_gemm_nt(moekern.per_token_cast_to_fp8(x), (q, s), out_dtype=torch.float32)


def gated(x: torch.Tensor, q: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    y = moekern.silu_mul_cast_to_fp8(torch.cat([x, x], dim=1))
    return moekern.fp8_gemm_nt(y, ScaledTensor(q, s)) + moekern.dequantize(moekern.per_block_cast_to_fp8(x)).sum()


def into(x: torch.Tensor, q: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(x.shape[0], q.shape[0])
    return moekern.fp8_gemm_nt(x, ScaledTensor(q, s, (128, 128)), c=out, out=out) * 2


MODELS = [w8a16, w8a8, gated, into]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("model", MODELS)
def test_compile_without_graph_breaks(model: Callable[..., torch.Tensor]) -> None:
    q, s = weights()
    x = rand(5, K)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, q, s), model(x, q, s), rtol=0, atol=0)


@pytest.mark.parametrize("model", MODELS)
def test_one_graph_for_every_number_of_rows(model: Callable[..., torch.Tensor]) -> None:
    q, s = weights()
    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for m in (7, 3, 64, 130, 257):
        x = rand(m, K)
        torch.testing.assert_close(compiled(x, q, s), model(x, q, s), rtol=0, atol=0)
    assert graphs == 1


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor() -> None:
    q, s = weights()
    x = rand(5, K)
    torch.testing.assert_close(torch.compile(w8a16, fullgraph=True)(x, q, s), w8a16(x, q, s), rtol=1e-6, atol=1e-6)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        q, s = weights()
        self.register_buffer("weight", q)
        self.register_buffer("weight_scale_inv", s)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return moekern.fp8_gemm_nt(moekern.per_token_cast_to_fp8(x), (self.weight, self.weight_scale_inv))


def test_export_with_a_dynamic_batch() -> None:
    layer = Layer()
    program = torch.export.export(layer, (rand(5, K),), dynamic_shapes=({0: torch.export.Dim("m", min=1, max=4096)},))
    for m in (2, 5, 300):
        assert torch.equal(program.module()(rand(m, K)), layer(rand(m, K)))
    assert any(node.target is torch.ops.moekern.fp8_gemm_nt.default for node in program.graph.nodes)


def test_fake_tensors() -> None:
    q, s = weights()
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (rand(5, K), q, s)]
        assert w8a16(*fake).shape == (5, N) and w8a16(*fake).dtype == torch.float32
        half = moekern.fp8_gemm_nt(fake[0].to(torch.bfloat16), (fake[1], fake[2]))
        assert half.shape == (5, N) and half.dtype == torch.bfloat16
        cast = moekern.per_token_cast_to_fp8(fake[0], "e5m2")
        assert cast.data.shape == (5, K) and cast.data.dtype == torch.float8_e5m2 and cast.scale.shape == (5, 3)
        assert moekern.per_block_cast_to_fp8(fake[0]).scale.shape == (1, 3)
        assert moekern.per_channel_cast_to_fp8(fake[0]).scale.shape == (1, K)
        assert moekern.silu_mul_cast_to_fp8(fake[0]).data.shape == (5, K // 2)
        assert moekern.dequantize(cast, out_dtype=torch.float16).dtype == torch.float16
        with pytest.raises(RuntimeError, match="same number of columns"):
            moekern.fp8_gemm_nt(fake[0][:, 1:], (fake[1], fake[2]))


# test_schema multiplies its inputs, which torch cannot do with FP8 on CPU.
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("activations", ["float", "float with gradient", "FP8"])
def test_opcheck_gemm(activations: str) -> None:
    q, s = weights()
    x = rand(5, K)
    if activations == "FP8":
        a, sa = moekern.per_token_cast_to_fp8(x)
        args = (a, sa, [1, 128], q, s, [128, 128], None, rand(N), torch.float32)
    else:
        args = (
            x.requires_grad_(activations.endswith("gradient")),
            None,
            [1, 1],
            q,
            s,
            [128, 128],
            rand(5, N),
            None,
            None,
        )
    torch.library.opcheck(torch.ops.moekern.fp8_gemm_nt.default, args, test_utils=CHECKS)


def test_opcheck_casts() -> None:
    x = rand(5, K)
    for name in ("per_token", "per_block", "per_channel", "silu_mul"):
        op = getattr(torch.ops.moekern, f"{name}_cast_to_fp8").default
        torch.library.opcheck(op, (x, "e4m3fn", False), test_utils=CHECKS[1:])
    q, s = weights()
    torch.library.opcheck(
        torch.ops.moekern.dequantize.default, (q, s, [128, 128], torch.bfloat16), test_utils=CHECKS[1:]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(dtype: torch.dtype) -> None:
    """dA = dD B, dC = dD, d(bias) = column sums of dD, against float64 autograd."""
    w = weights()
    x, c, bias = (t.to(dtype) for t in (rand(5, K), rand(5, N), rand(N)))
    upstream = rand(5, N)
    ours = [t.clone().requires_grad_() for t in (x, c, bias)]
    exact = [t.double().requires_grad_() for t in (x, c, bias)]
    moekern.fp8_gemm_nt(ours[0], w, ours[1], ours[2], out_dtype=torch.float32).backward(upstream)
    (exact[0] @ w.to_float64().T + exact[1] + exact[2]).backward(upstream.double())
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for got, expected in zip(ours, exact, strict=True):
        assert got.grad is not None and expected.grad is not None and got.grad.dtype == dtype
        torch.testing.assert_close(got.grad.double(), expected.grad, rtol=tolerance, atol=tolerance)


def test_gradients_under_compile() -> None:
    q, s = weights()
    x = rand(5, K)
    grads = []
    for model in (w8a16, torch.compile(w8a16, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        model(leaf, q, s).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_no_gradient_for_what_has_none() -> None:
    """FP8 activations are constants; a frozen weight asks for no gradient."""
    w, a = weights(), moekern.per_token_cast_to_fp8(rand(5, K))
    bias = rand(N).requires_grad_()
    moekern.fp8_gemm_nt(a, w, bias=bias).sum().backward()
    assert bias.grad is not None and torch.allclose(bias.grad, torch.full((N,), 5.0))
    with torch.no_grad():
        assert not moekern.fp8_gemm_nt(rand(5, K).requires_grad_(), w).requires_grad
