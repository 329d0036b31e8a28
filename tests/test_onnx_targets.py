"""moekern.onnx: files for given runtimes, whole models, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moekern
from moekern import ScaledTensor

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

import onnx  # noqa: E402
from onnx_models import E, Experts, H, Linear, stacked  # noqa: E402

from moekern.onnx import FORMS, MODES, TARGETS, export, runtimes  # noqa: E402
from moekern.onnx.checkpoint import load  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]
FLOAT16 = [name for name, target in TARGETS.items() if target.mode == "fp16"]


@pytest.mark.parametrize("name", TARGETS)
def test_a_layer_for_every_target(tmp_path: Path, name: str) -> None:
    """Ragged sizes, shared experts, grouped sigmoid gate: every operator is on the target's list, or export raises."""
    gate = {"scoring": "sigmoid", "num_expert_group": 3, "topk_group": 2, "renormalize": True}
    dtype = torch.float16 if name in FLOAT16 else torch.float32
    model = Experts(stacked, shared=True, gate={**gate, "correction_bias": torch.linspace(-0.1, 0.1, E)})
    shapes = None if TARGETS[name].static else ({0: torch.export.Dim("tokens", min=1, max=4096)},)
    report = export(model, (torch.randn(5, H).to(dtype),), tmp_path / "m.onnx", target=name, dynamic_shapes=shapes)
    most = 1e-3 if name in FLOAT16 else 2e-6
    assert all(found.rms < most for found in report.runtimes.values())
    assert all(layer.difference.rms < most for layer in report.layers)
    assert ("OpenVINO" in report.runtimes) == (name == "openvino")
    if name in ("ascend", "migraphx", "qnn"):
        assert (report.opset, report.ir, report.mode, report.moe) == (17, 8, "fp16", "dense")
        model = onnx.load(tmp_path / "m.onnx", load_external_data=False)
        stored = {tensor.name for tensor in model.graph.initializer}
        assert not any(set(node.input) <= stored for node in model.graph.node), "a node of constants alone"


def test_openvino_runs_every_mode_that_its_target_takes(tmp_path: Path) -> None:
    x = torch.randn(5, H)
    for mode, moe in (("uint8-lut", "loop"), ("int8-qdq", "dense"), ("fp16", "dense")):
        report = export(Experts(stacked), (x,), tmp_path / "m.onnx", target="openvino", mode=mode, moe=moe)
        assert report.runtimes["OpenVINO"].rms < {"uint8-lut": 2e-6, "int8-qdq": 2e-2, "fp16": 1e-3}[mode]


REFUSED = [
    ("ascend", {"mode": "fp8-qdq"}, "ascend takes no mode.*no FP8 type"),
    ("ascend", {"moe": "sparse"}, "depend on the routing"),
    ("ascend", {"opset": 18}, "opset is 18; ascend takes none above 17"),
    ("ort-cuda", {"mode": "fp8-qdq"}, "blocks of 4-bit integers alone"),
    ("migraphx", {"moe": "loop"}, "migraphx takes no moe"),
    ("openvino", {"mode": "ort-contrib"}, "onnxruntime's"),
    ("qnn", {"dynamic_shapes": ({0: torch.export.Dim("tokens")},)}, "qnn takes static shapes only"),
]


@pytest.mark.parametrize(("name", "options", "reason"), REFUSED)
def test_what_a_target_refuses(tmp_path: Path, name: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(moekern.NotSupported, match=reason):
        export(Linear(), (torch.randn(5, 200),), tmp_path / "m.onnx", target=name, **options)


def test_a_target_lowers_the_opset_of_a_mode_that_it_does_not_choose(tmp_path: Path) -> None:
    report = export(Linear(), (torch.randn(5, 200),), tmp_path / "m.onnx", target="migraphx", mode="uint8-lut")
    assert report.opset == 19 and report.layers[0].difference.rms < 2e-6


def test_every_refusal_is_of_a_mode_or_form() -> None:
    for target in TARGETS.values():
        assert target.refused.keys() <= {*MODES, *FORMS}
        assert not {target.mode, target.moe} & target.refused.keys()
        known = target.operators()
        assert known["source"] and known["runtime"] and len(known["operators"]) > 50


class Block(nn.Module):
    """A module whose operator is on no list of accelerators."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.det(x.reshape(-1, 2, 2))


class Outer(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


def test_operators_that_are_not_on_the_list_are_named_with_their_module(tmp_path: Path) -> None:
    with pytest.raises(moekern.NotSupported, match=r"QNN.*\n  Det: block"):
        export(Outer(Block()), (torch.randn(4, 4),), tmp_path / "m.onnx", target="qnn")
    with pytest.raises(moekern.NotSupported, match="values of type bfloat16: the model"):
        export(Linear(), (torch.randn(4, 200).bfloat16(),), tmp_path / "m.onnx", target="ascend")


def test_wrong_options(tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [{"mode": "int4"}, {"moe": "scan"}, {"opset": 16}, {"opset": 28}]
    for option in (*wrong, {"target": "tpu"}, {"activations": "int8"}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is .* must be one of"):
            export(Linear(), (torch.randn(5, 200),), tmp_path / "m.onnx", **option)
    for option, reason in (
        ({"opset": 17}, "mode fp8-qdq needs 21"),
        ({"moe": "loop"}, 'uint8-lut" keeps the FP8 bytes in a Loop'),
        ({"moe": "contrib"}, 'takes mode="ort-contrib"'),
        ({"mode": "fp16", "activations": "fp8"}, "needs 21"),
    ):
        with pytest.raises(ValueError, match=reason):
            export(Linear(), (torch.randn(5, 200),), tmp_path / "m.onnx", **option)  # type: ignore[arg-type]


class Chooses(nn.Module):
    """As many rows as are positive."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x[x[:, 0] > 0]
        return rows if rows.shape[0] > 3 else x


def test_shapes_that_depend_on_values_are_explained(tmp_path: Path) -> None:
    with pytest.raises(moekern.NotSupported, match=r"block has a shape that depends on values.*torch\.where"):
        export(Outer(Chooses()), (torch.randn(5, 8),), tmp_path / "m.onnx")


class Eigen(nn.Module):
    """Of an operator that ONNX does not have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigh(x @ x.T)[0]


def test_operators_that_onnx_does_not_have_are_named_with_their_module(tmp_path: Path) -> None:
    with pytest.raises(moekern.NotSupported, match=r"block: .*linalg_eigh"):
        export(Outer(Eigen()), (torch.randn(4, 4),), tmp_path / "m.onnx")


def test_weights_that_are_inputs_are_refused(tmp_path: Path) -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return moekern.fp8_gemm_nt(x, ScaledTensor(self.weight, scale, (128, 128)))

    model = Model()
    model.register_buffer("weight", torch.zeros(8, 128, dtype=torch.float8_e4m3fn))
    with pytest.raises(moekern.NotSupported, match="depend on the input scale"):
        export(model, (torch.randn(5, 128), torch.ones(1, 1)), tmp_path / "m.onnx")


def test_a_file_that_onnxruntime_cannot_load_says_what_helps(tmp_path: Path) -> None:
    path = tmp_path / "new.onnx"
    slots = [onnx.helper.make_tensor_value_info(name, 1, [2]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "g", slots[:1], slots[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 999)], ir_version=10), path)
    with pytest.raises(ValueError, match="A lower opset= may do"):
        runtimes.onnxruntime(path, {"x": torch.zeros(2)})


def test_bfloat16_that_onnxruntime_does_not_multiply_says_what_helps(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.float\(\)"):
        export(nn.Linear(8, 8).bfloat16(), (torch.randn(5, 8).bfloat16(),), tmp_path / "m.onnx")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("transformers")
    import tiny_models

    return {name: tiny_models.write(name, tmp_path_factory.mktemp(name)) for name in tiny_models.NAMES}


WHOLE = [
    ("deepseek-v3", "ort-cpu"),
    ("deepseek-v3", "ascend"),
    ("qwen3-moe", "openvino"),
    ("mixtral", "ort-cuda"),
    ("qwen3", "ort-cpu"),
]


@pytest.mark.parametrize(("name", "target"), WHOLE)
def test_whole_models(tmp_path: Path, folders: dict[str, Path], name: str, target: str) -> None:
    import moekern.integrations.transformers as integration

    static = target in ("ascend", "migraphx", "qnn")
    half = target in FLOAT16
    with integration.install():
        model = load(folders[name], torch.float16 if half else torch.float32)
        shapes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("sequence", min=2, max=256)}
        ids = torch.arange(12).view(2, 6) * 23 % 512
        path = tmp_path / "m.onnx"
        report = export(model, (ids,), path, target=target, dynamic_shapes=None if static else (shapes,))
        most = 5e-3 if half else 1e-5  # float16's errors add up over layers
        assert all(found.rms < most for found in report.runtimes.values())
        assert all(layer.difference.rms < (1e-3 if half else 2e-6) for layer in report.layers)
        assert {layer.module.split(".")[0] for layer in report.layers} == {"model"}
        if not static:
            other = torch.arange(51).view(3, 17) * 7 % 512
            (got,) = runtimes.onnxruntime(path, {"ids": other})
            with torch.no_grad():
                expected = model(other)
            off = (got - expected).double().norm(dim=-1) / expected.double().norm(dim=-1)
            assert off.median() < most  # float16 may send a token to another expert


def test_command(tmp_path: Path, folders: dict[str, Path]) -> None:
    command = [sys.executable, "-m", "moekern", "export"]
    written = subprocess.run(
        [*command, folders["qwen3-moe"], tmp_path / "m.onnx", "--target", "ascend", "--static"],
        capture_output=True,
        text=True,
    )
    assert written.returncode == 0, written.stderr
    assert "fp16, dense" in written.stdout and "mlp.experts" in written.stdout
    onnx.checker.check_model(tmp_path / "m.onnx")
    failed = subprocess.run([*command, tmp_path, tmp_path / "n.onnx"], capture_output=True, text=True)
    assert failed.returncode == 1 and "has no config.json" in failed.stderr and "Traceback" not in failed.stderr
