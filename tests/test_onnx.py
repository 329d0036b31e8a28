"""moekern.onnx: what onnxruntime computes from a file, beside the model; what the file holds; what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moekern
from moekern import ExpertWeights, ScaledTensor

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

import onnx  # noqa: E402
import onnxruntime  # noqa: E402

from moekern.onnx import MODES, export, load_weights  # noqa: E402

pytestmark = pytest.mark.slow
AT_MOST = {"fp8-qdq": 2e-6, "uint8-lut": 2e-6, "int8-qdq": 2e-2, "fp16": 1e-3, "bf16": 6e-3}  # relative, rms
TOKENS = ({0: torch.export.Dim("tokens", min=1, max=4096)},)


class Linear(nn.Module):
    def __init__(self, quantized: bool = False, scale_fmt: bool = False, n: int = 160, k: int = 200) -> None:
        super().__init__()
        torch.manual_seed(0)
        weight = moekern.per_block_cast_to_fp8(torch.randn(n, k))
        self.weight, self.scale = nn.Parameter(weight.data, requires_grad=False), nn.Parameter(weight.scale)
        self.bias, self.quantized, self.round_up = nn.Parameter(torch.randn(n)), quantized, scale_fmt

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = moekern.per_token_cast_to_fp8(x, round_scale_up=self.round_up) if self.quantized else x
        return moekern.fp8_gemm_nt(a, (self.weight, self.scale), bias=self.bias, out_dtype=torch.float32)


def weights(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    cast = [moekern.per_block_cast_to_fp8(torch.randn(shape[1:]) / shape[-1] ** 0.5) for _ in range(shape[0])]
    return torch.stack([c.data for c in cast]), torch.stack([c.scale for c in cast])


H, I, E, K = 200, 96, 6, 2


class Experts(nn.Module):
    """A layer whose experts are described by `describe(w13, w2)`."""

    def __init__(self, describe: Callable[..., ExpertWeights], shared: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, shape in (("w13", (E, 2 * I, H)), ("w2", (E, H, I)), ("s13", (1, 2 * I, H)), ("s2", (1, H, I))):
            data, scale = weights(*shape)
            self.register_buffer(name, data)
            self.register_buffer(f"{name}_scale", scale)
        self.register_buffer("b13", torch.randn(E, 2 * I))
        self.register_buffer("b2", torch.randn(E, H))
        self.router = nn.Parameter(torch.randn(E, H) / H**0.5)
        self.describe, self.shared, self.options = describe, shared, options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared = ExpertWeights((self.s13, self.s13_scale), (self.s2, self.s2_scale)) if self.shared else None
        routing = moekern.moe_gate(x.float() @ self.router.T, K, renormalize=True)
        return moekern.fused_experts(
            x, self.describe(self), routing.ids, routing.weights, shared=shared, **self.options
        )


def stacked(m: Any) -> ExpertWeights:
    return ExpertWeights((m.w13, m.w13_scale), (m.w2, m.w2_scale))


def listed(m: Any) -> ExpertWeights:
    """A matrix for every expert, gate and up apart."""
    pairs = [ScaledTensor(m.w13[e], m.w13_scale[e], (128, 128)) for e in range(E)]
    halves = [[ScaledTensor(p.data[h * I : h * I + I], p.scale[h : h + 1], (128, 128)) for p in pairs] for h in (0, 1)]
    return ExpertWeights.separate(*halves, [ScaledTensor(m.w2[e], m.w2_scale[e], (128, 128)) for e in range(E)])


def two_grids(m: Any) -> ExpertWeights:
    return ExpertWeights((m.w13, m.w13_scale), (m.w2, m.w2_scale), split_scales=True)


def gpt_oss(m: Any) -> ExpertWeights:
    return ExpertWeights((m.w13, m.w13_scale), (m.w2, m.w2_scale), b13=m.b13, b2=m.b2, interleaved=True)


def session(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def run(path: Path, x: torch.Tensor) -> torch.Tensor:
    ready = session(path)
    return torch.from_numpy(ready.run(None, {ready.get_inputs()[0].name: x.numpy()})[0])


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).double().norm() / b.double().norm()).item()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("quantized", [False, True], ids=["w8a16", "w8a8"])
def test_linear(tmp_path: Path, mode: str, quantized: bool) -> None:
    model, path = Linear(quantized), tmp_path / "m.onnx"
    report = export(model, (torch.randn(5, 200),), path, mode=mode, dynamic_shapes=TOKENS)
    assert report.rms_error is not None and report.rms_error < AT_MOST[mode]
    for tokens in (1, 33):
        x = torch.randn(tokens, 200)
        assert difference(run(path, x), model(x)) < AT_MOST[mode]
    assert mode in str(report) and "rms" in str(report)


def test_scales_that_are_powers_of_two(tmp_path: Path) -> None:
    report = export(Linear(True, scale_fmt=True), (torch.randn(64, 200),), tmp_path / "m.onnx", opset=23)
    assert report.rms_error is not None and report.rms_error < 2e-6


@pytest.mark.parametrize(("mode", "moe"), [*((mode, "dense") for mode in MODES), ("fp8-qdq", "sparse")])
def test_experts(tmp_path: Path, mode: str, moe: str) -> None:
    model, path = Experts(stacked), tmp_path / "m.onnx"
    report = export(model, (torch.randn(5, H),), path, mode=mode, moe=moe, dynamic_shapes=TOKENS)
    assert report.rms_error is not None and report.rms_error < AT_MOST[mode]
    for tokens in (1, 33):
        x = torch.randn(tokens, H)
        assert difference(run(path, x), model(x)) < AT_MOST[mode]


OPTIONS = {
    "listed": (listed, {}),
    "two grids": (two_grids, {}),
    "gpt-oss": (gpt_oss, {"alpha": 1.702, "beta": 1.0, "limit": 0.5}),
    "gelu": (stacked, {"activation": "gelu"}),
    "gelu_tanh": (stacked, {"activation": "gelu_tanh"}),
    "w8a8": (stacked, {"quantize_activations": True}),
    "shared": (stacked, {"shared": True}),
    "elsewhere": (stacked, {"expert_map": torch.tensor([3, -1, 0, 5, -1, 1])}),
}


@pytest.mark.parametrize(("option", "moe"), [*((option, "dense") for option in OPTIONS), ("elsewhere", "sparse")])
def test_options_of_experts(tmp_path: Path, option: str, moe: str) -> None:
    describe, options = OPTIONS[option]
    report = export(Experts(describe, **options), (torch.randn(9, H),), tmp_path / "m.onnx", moe=moe)
    assert report.rms_error is not None and report.rms_error < AT_MOST["fp8-qdq"]


GATES = [
    {},
    {"renormalize": True, "routed_scaling_factor": 2.5},
    {"scoring": "sigmoid", "num_expert_group": 4, "topk_group": 2, "renormalize": True},
    {"scoring": "sigmoid", "num_expert_group": 4, "topk_group": 2, "correction_bias": torch.linspace(-0.1, 0.1, 16)},
    {"num_expert_group": 2, "topk_group": 1, "mask_value": 0.0},
]


@pytest.mark.parametrize("options", GATES, ids=range(len(GATES)))
def test_gate(tmp_path: Path, options: dict[str, Any]) -> None:
    class Gate(nn.Module):
        def forward(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return tuple(moekern.moe_gate(logits, 3, **options))

    logits = torch.randn(40, 16)
    logits[7] = 1.0  # ties: the lowest index first
    export(Gate(), (logits,), tmp_path / "m.onnx")
    expected = moekern.moe_gate(logits, 3, **options)
    ready = session(tmp_path / "m.onnx")
    weights, ids = map(torch.from_numpy, ready.run(None, {ready.get_inputs()[0].name: logits.numpy()}))
    assert torch.equal(ids, expected.ids)
    torch.testing.assert_close(weights, expected.weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("moe", ["dense", "sparse"])
def test_nan_stays_in_its_row(tmp_path: Path, moe: str) -> None:
    model = Experts(stacked)
    x = torch.randn(5, H)
    export(model, (x,), tmp_path / "m.onnx", moe=moe)
    expected = run(tmp_path / "m.onnx", x)
    for bad in (float("nan"), float("inf")):
        wrong = x.clone()
        wrong[0, 0] = bad
        got = run(tmp_path / "m.onnx", wrong)
        assert not got[0].isfinite().all()
        torch.testing.assert_close(got[1:], expected[1:])  # an expert may have fewer rows, and other last bits


@pytest.mark.parametrize("mode", ["fp8-qdq", "uint8-lut"])
def test_weights_come_back_bit_for_bit(tmp_path: Path, mode: str) -> None:
    model = Experts(two_grids)
    export(model, (torch.randn(5, H),), tmp_path / "m.onnx", mode=mode, verify=False)
    found = load_weights(tmp_path / "m.onnx")
    assert len(found) == 3 * E
    for e in range(E):
        for name, data, scale in (
            (f"w13.{e}.gate", model.w13[e, :I], model.w13_scale[e, :1]),
            (f"w13.{e}.up", model.w13[e, I:], model.w13_scale[e, 1:]),
            (f"w2.{e}", model.w2[e], model.w2_scale[e]),
        ):
            assert found[name].data.dtype == torch.float8_e4m3fn
            assert torch.equal(found[name].data.view(torch.uint8), data.view(torch.uint8))
            assert torch.equal(found[name].scale, scale)
            assert list(found[name].block) == [128, 128]


@pytest.mark.parametrize("mode", ["fp8-qdq", "fp16"])
def test_a_layer_that_is_used_twice_is_stored_once(tmp_path: Path, mode: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Linear(n=256, k=256)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    report = export(Twice(), (torch.randn(5, 256),), tmp_path / "m.onnx", mode=mode)
    assert report.rms_error is not None and report.rms_error < 3 * AT_MOST[mode]
    assert report.bytes < (1.5 if mode == "fp8-qdq" else 2.5) * 256 * 256


def test_only_exact_files_give_weights_back(tmp_path: Path) -> None:
    export(Linear(), (torch.randn(5, 200),), tmp_path / "m.onnx", mode="fp16", verify=False)
    with pytest.raises(ValueError, match="keeps no FP8 weights"):
        load_weights(tmp_path / "m.onnx")


def test_weights_are_stored_once_and_not_expanded(tmp_path: Path) -> None:
    model = Linear(n=1024, k=1024)
    report = export(model, (torch.randn(5, 1024),), tmp_path / "m.onnx", verify=False)
    assert report.bytes < 1.05 * 1024 * 1024
    graph = onnx.load(tmp_path / "m.onnx", load_external_data=False).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    assert shapes["weight"] == [1024, 1024] and shapes["weight_scale_inv"] == [8, 8]


def test_wrong_options(tmp_path: Path) -> None:
    for option in ({"mode": "int4"}, {"moe": "loop"}, {"opset": 17}, {"opset": 28}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is .* must be one of"):
            export(Linear(), (torch.randn(5, 200),), tmp_path / "m.onnx", **option)  # type: ignore[arg-type]


def test_what_has_no_translation_is_named(tmp_path: Path) -> None:
    class Inner(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return moekern.moe_permute(x, torch.zeros(5, 1, dtype=torch.int32), 2).x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Inner()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(x)

    with pytest.raises(moekern.NotSupported, match=r"block calls moekern::moe_permute.*fused_experts"):
        export(Outer(), (torch.randn(5, 8),), tmp_path / "m.onnx")


def test_weights_that_are_inputs_are_refused(tmp_path: Path) -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return moekern.fp8_gemm_nt(x, ScaledTensor(self.weight, scale, (128, 128)))

    model = Model()
    model.register_buffer("weight", torch.zeros(8, 128, dtype=torch.float8_e4m3fn))
    with pytest.raises(moekern.NotSupported, match="depend on the input scale"):
        export(model, (torch.randn(5, 128), torch.ones(1, 1)), tmp_path / "m.onnx")


def test_whole_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    import tiny_models

    import moekern.integrations.transformers as integration

    with integration.install():
        model = tiny_models.Logits(
            tiny_models.transformers.AutoModelForCausalLM.from_pretrained(
                tiny_models.write("deepseek-v3", tmp_path / "model"),
                dtype=torch.float32,
                attn_implementation="eager",
                experts_implementation="moekern",
            ).eval()
        )
        shapes = ({0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("sequence", min=2, max=256)},)
        ids = torch.arange(12).view(2, 6) * 23 % 512
        report = export(model, (ids,), tmp_path / "m.onnx", moe="sparse", dynamic_shapes=shapes)
        assert report.rms_error is not None and report.rms_error < 1e-5
        other = torch.arange(51).view(3, 17) * 7 % 512
        with torch.no_grad():
            expected = model(other)
        assert difference(run(tmp_path / "m.onnx", other), expected) < 1e-5
