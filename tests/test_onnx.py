"""moekern.onnx: what runtimes compute from a file, beside the model and the float64 references; what the file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moekern

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from onnx_models import (  # noqa: E402
    TOKENS,
    Casts,
    E,
    Experts,
    Gradients,
    Grouped,
    H,
    I,
    Linear,
    Masked,
    gpt_oss,
    listed,
    stacked,
    two_grids,
)

from moekern.onnx import MODES, ExportReport, export, load_weights  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]
AT_MOST = {  # relative, rms
    "fp8-qdq": 2e-6,
    "uint8-lut": 2e-6,
    "int8-qdq": 2e-2,
    "fp16": 1e-3,
    "bf16": 6e-3,
    "ort-contrib": 2e-2,
}


def run(path: Path, *feeds: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [slot.name for slot in session.get_inputs()]
    return torch.from_numpy(session.run(None, dict(zip(names, (x.numpy() for x in feeds), strict=True)))[0])


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).double().norm() / b.double().norm()).item()


def check(report: ExportReport, most: float, reference: bool = True) -> None:
    """Every runtime against the model, every call against its float64 reference."""
    assert set(report.runtimes) >= ({"onnxruntime", "onnx.reference"} if reference else {"onnxruntime"})
    assert report.layers
    for where, found in [*report.runtimes.items(), *((str(layer), layer.difference) for layer in report.layers)]:
        assert found.rms < most, where
        assert found.max < 3 * most, where


@pytest.mark.parametrize(("mode", "quantized"), [*((mode, False) for mode in MODES), ("fp8-qdq", True), ("fp16", True)])
def test_linear(tmp_path: Path, mode: str, quantized: bool) -> None:
    model, path = Linear(quantized), tmp_path / "m.onnx"
    opset = 21 if quantized else None
    report = export(model, (torch.randn(5, 200),), path, mode=mode, opset=opset, dynamic_shapes=TOKENS)
    check(report, AT_MOST[mode], reference=mode != "ort-contrib")
    for tokens in (1, 33):
        x = torch.randn(tokens, 200)
        assert difference(run(path, x), model(x)) < AT_MOST[mode]


def test_more_dimensions_and_bfloat16_results(tmp_path: Path) -> None:
    for x, out, most in ((torch.randn(2, 3, 200), torch.float32, 2e-6), (torch.randn(5, 200), torch.bfloat16, 2e-3)):
        check(export(Linear(out=out), (x,), tmp_path / "m.onnx"), most)


def test_activations_in_fp8_where_the_model_has_floats(tmp_path: Path) -> None:
    report = export(Linear(), (torch.randn(5, 200),), tmp_path / "linear.onnx", activations="fp8")
    assert report.layers[0].difference.rms < 2e-6  # from the quantised product
    assert 1e-2 < report.runtimes["onnxruntime"].rms < 4e-2  # from the model's
    report = export(Experts(stacked), (torch.randn(5, H),), tmp_path / "experts.onnx", activations="fp8", moe="sparse")
    assert {layer.op: layer.difference.rms < 2e-6 for layer in report.layers} == {
        "moe_gate": True,
        "fused_experts": True,
    }


KINDS = [  # every mode, and every form with those that are a case of their own in it
    *((mode, "dense") for mode in MODES if mode != "ort-contrib"),
    ("fp8-qdq", "sparse"),
    ("fp16", "sparse"),
    ("ort-contrib", "sparse"),
    ("uint8-lut", "loop"),
    ("int8-qdq", "loop"),
    ("fp16", "contrib"),
    ("ort-contrib", "contrib"),
]


@pytest.mark.parametrize(("mode", "moe"), KINDS)
def test_experts(tmp_path: Path, mode: str, moe: str) -> None:
    model, path = Experts(stacked, shared=True), tmp_path / "m.onnx"
    report = export(model, (torch.randn(5, H),), path, mode=mode, moe=moe, dynamic_shapes=TOKENS)
    check(report, AT_MOST[mode], reference=mode != "ort-contrib" and moe != "contrib")
    for tokens in (1, 33):
        x = torch.randn(tokens, H)
        assert difference(run(path, x), model(x)) < AT_MOST[mode]


OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "listed": (listed, {}),
    "two grids": (two_grids, {}),
    "gpt-oss": (gpt_oss, {"alpha": 1.702, "beta": 1.0, "limit": 0.5}),
    "gelu": (stacked, {"activation": "gelu"}),
    "gelu_tanh": (stacked, {"activation": "gelu_tanh"}),
    "w8a8": (stacked, {"quantize_activations": True}),
    "elsewhere": (stacked, {"expert_map": torch.tensor([3, -1, 0, 5, -1, 1])}),
    "on input": (stacked, {"apply_router_weight_on_input": True}),
    "slots": (stacked, {"reduce": False}),
}
CHOSEN = [
    *((option, "fp8-qdq", "dense") for option in OPTIONS),
    *((option, "uint8-lut", "loop") for option in ("listed", "gpt-oss", "elsewhere", "slots")),
    ("elsewhere", "fp8-qdq", "sparse"),
    ("on input", "fp8-qdq", "sparse"),
    ("gpt-oss", "fp16", "dense"),
    ("gpt-oss", "ort-contrib", "contrib"),
]


@pytest.mark.parametrize(("option", "mode", "moe"), CHOSEN)
def test_options_of_experts(tmp_path: Path, option: str, mode: str, moe: str) -> None:
    describe, options = OPTIONS[option]
    report = export(Experts(describe, **options), (torch.randn(9, H),), tmp_path / "m.onnx", mode=mode, moe=moe)
    check(report, AT_MOST[mode], reference=moe != "contrib")


GATES = [
    {},
    {"renormalize": True, "routed_scaling_factor": 2.5},
    {"scoring": "sigmoid", "num_expert_group": 4, "topk_group": 2, "renormalize": True},
    {"scoring": "sigmoid", "num_expert_group": 4, "topk_group": 2, "correction_bias": torch.linspace(-0.1, 0.1, 16)},
    {"num_expert_group": 2, "topk_group": 1, "mask_value": 0.0},
]


class Gate(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = moekern.moe_gate(logits, 3, **self.options)
        return ids, weights


@pytest.mark.parametrize("options", GATES, ids=range(len(GATES)))
def test_gate(tmp_path: Path, options: dict[str, Any]) -> None:
    logits = torch.randn(40, 16)
    logits[7] = 1.0  # ties: the lowest index first
    check(export(Gate(**options), (logits,), tmp_path / "m.onnx"), 1e-6)
    assert torch.equal(run(tmp_path / "m.onnx", logits), moekern.moe_gate(logits, 3, **options).ids)


@pytest.mark.parametrize("cast", [None, "before", "within"])
def test_grouped_products_between_permutations(tmp_path: Path, cast: str | None) -> None:
    tokens = torch.export.Dim("tokens", min=1, max=4096)
    model, shapes = Grouped(cast), tuple({0: tokens} for _ in range(3))
    for seed, moe in enumerate(("dense", "sparse")):
        feeds = torch.randn(9, H), torch.randint(-1, E, (9, 2)).int(), torch.rand(9, 2)
        path = tmp_path / f"{seed}.onnx"
        check(export(model, feeds, path, moe=moe, dynamic_shapes=shapes), 2e-6)
        other = torch.randn(33, H), torch.randint(-1, E, (33, 2)).int(), torch.rand(33, 2)
        assert difference(run(path, *other), model(*other)) < 2e-6


def test_masked_products_and_weight_gradients(tmp_path: Path) -> None:
    counts = torch.tensor([0, 5, 1, 2, 3, 4])
    check(export(Masked(), (torch.randn(E, 5, H), counts), tmp_path / "masked.onnx"), 2e-6)
    feeds = torch.randn(300, 40), torch.randn(300, 56), torch.tensor([128, 128, 290])
    check(export(Gradients(), feeds, tmp_path / "gradients.onnx"), 2e-6)


@pytest.mark.parametrize(
    ("format", "round_up"), [("e4m3fn", False), ("e4m3fn", True), ("e5m2", False), ("e4m3fnuz", False)]
)
def test_casts(tmp_path: Path, format: str, round_up: bool) -> None:
    check(export(Casts(format, round_up), (torch.randn(130, 200),), tmp_path / "m.onnx"), 1e-4)  # one value in 10^4 ...


def test_scales_that_are_powers_of_two(tmp_path: Path) -> None:
    check(export(Linear(True, scale_fmt=True), (torch.randn(64, 200),), tmp_path / "m.onnx", opset=23), 2e-6)


@pytest.mark.parametrize("moe", ["dense", "sparse"])
def test_nan_stays_in_its_row(tmp_path: Path, moe: str) -> None:
    x = torch.randn(5, H)
    export(Experts(stacked), (x,), tmp_path / "m.onnx", moe=moe, verify=False)
    expected = run(tmp_path / "m.onnx", x)
    for bad in (float("nan"), float("inf")):
        wrong = x.clone()
        wrong[0, 0] = bad
        got = run(tmp_path / "m.onnx", wrong)
        assert not got[0].isfinite().all()
        torch.testing.assert_close(got[1:], expected[1:])  # an expert may have fewer rows, and other last bits


@pytest.mark.parametrize(("mode", "moe"), [("fp8-qdq", "dense"), ("uint8-lut", "dense"), ("uint8-lut", "loop")])
def test_weights_come_back_bit_for_bit(tmp_path: Path, mode: str, moe: str) -> None:
    model = Experts(two_grids)
    export(model, (torch.randn(5, H),), tmp_path / "m.onnx", mode=mode, moe=moe, verify=False)
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


def test_only_exact_files_give_weights_back(tmp_path: Path) -> None:
    export(Linear(), (torch.randn(5, 200),), tmp_path / "m.onnx", mode="fp16", verify=False)
    with pytest.raises(ValueError, match="keeps no FP8 weights"):
        load_weights(tmp_path / "m.onnx")


class Twice(nn.Module):
    """One layer, and its scales once more by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Linear(n=256, k=256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.tanh(self.layer(x))) + self.layer.scale.sum()


@pytest.mark.parametrize("mode", ["fp8-qdq", "fp16"])
def test_a_layer_that_is_used_twice_is_stored_once(tmp_path: Path, mode: str) -> None:
    report = export(Twice(), (torch.randn(5, 256),), tmp_path / "m.onnx", mode=mode)
    check(report, 3 * AT_MOST[mode])
    assert report.bytes < (1.5 if mode == "fp8-qdq" else 2.5) * 256 * 256


def test_weights_are_stored_once_and_not_expanded(tmp_path: Path) -> None:
    report = export(Linear(n=1024, k=1024), (torch.randn(5, 1024),), tmp_path / "m.onnx", verify=False)
    assert report.bytes < 1.05 * 1024 * 1024
    graph = onnx.load(tmp_path / "m.onnx", load_external_data=False).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    assert shapes["weight"] == [1024, 1024] and shapes["weight_scale_inv"] == [8, 8]


def test_report_says_what_was_written(tmp_path: Path) -> None:
    report = export(Experts(stacked), (torch.randn(5, H),), tmp_path / "m.onnx", target="ort-cpu")
    text = str(report)
    for part in ("ort-cpu", "fp8-qdq, sparse, float", "21, 10", "in onnxruntime", "fused_experts", "rms"):
        assert part in text
    unverified = export(Linear(), (torch.randn(5, 200),), tmp_path / "m.onnx", verify=False)
    assert not unverified.runtimes and not unverified.layers and "verified" in str(unverified)


def test_a_wrong_scale_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moekern.onnx import weights

    exact = weights.in_steps
    monkeypatch.setattr(weights, "in_steps", lambda x, *block: (exact(x, *block)[0], 1.05 * exact(x, *block)[1]))
    report = export(Linear(), (torch.randn(5, 200),), tmp_path / "m.onnx", mode="int8-qdq")
    assert report.layers[0].difference.rms > AT_MOST["int8-qdq"]


def test_other_experts_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moekern.onnx import routing

    right = routing.gate

    def wrong(*arguments: Any) -> Any:
        graph, (weights, ids) = arguments[0], right(*arguments)
        return weights, graph.op.Mul(ids, graph.constant(torch.tensor(0, dtype=torch.int32)))

    monkeypatch.setattr(routing, "gate", wrong)
    with pytest.raises(RuntimeError, match="moe_gate in onnxruntime"):
        export(Gate(), (torch.randn(40, 16),), tmp_path / "m.onnx")
