"""Weights are used where they lie, also in a memory-mapped file."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import moekern
from moekern.checkpoint import INDEX, Checkpoint
from moekern.testing.moe_models import LAYERS, routing

MIB = 1 << 20
SCRIPT = Path(__file__).parents[1] / "bench" / "make_checkpoint.py"


def private_bytes() -> int:
    """Resident memory that is the process's own: what a mapped file holds is not counted."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("no RssAnon in /proc/self/status")


@pytest.mark.parametrize("m", [1, 7, 300])
def test_a_mapped_checkpoint_is_neither_copied_nor_repacked(tmp_path: Path, m: int) -> None:
    n, k = 6144, 8192
    weight = torch.randn(n, k).to(torch.float8_e4m3fn)
    scale = torch.rand(n // 128, k // 128)
    save_file({"w.weight": weight, "w.weight_scale_inv": scale}, tmp_path / "model.safetensors")
    a = torch.randn(m, k, dtype=torch.bfloat16)
    out = torch.zeros(m, n, dtype=torch.bfloat16)
    threads = 2
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file, moekern.use(num_threads=threads):
        mapped = moekern.ScaledTensor(file.get_tensor("w.weight"), file.get_tensor("w.weight_scale_inv"))
        before = private_bytes()
        moekern.fp8_gemm_nt(a, mapped, out=out)
        grown = private_bytes() - before
    assert grown < threads * 16 * MIB < n * k, (
        f"{grown / MIB:.1f} MiB more after a product with {n * k / MIB:.0f} MiB of weights"
    )
    assert torch.equal(out, moekern.fp8_gemm_nt(a, (weight, scale)))


# ---- Mixture-of-Experts layers -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_checkpoint() -> ModuleType:
    pytest.importorskip("typer")
    spec = importlib.util.spec_from_file_location("make_checkpoint", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("tokens", [1, 40])
def test_experts_of_a_mapped_checkpoint_are_not_copied(
    make_checkpoint: ModuleType, tmp_path: Path, tokens: int
) -> None:
    layer = LAYERS["deepseek-v3"].scaled_down(2, experts=32)
    size = make_checkpoint.make(tmp_path, layer, layers=1, first=3)
    before = private_bytes()
    found = Checkpoint(tmp_path).moe_layer(3)
    assert found.shared is not None
    x = torch.randn(tokens, layer.hidden).bfloat16()
    ids, weights = routing(tokens, 32, 8)
    with moekern.use(num_threads=2):
        for shift in range(0, 32, 8):  # of few tokens too, every expert
            moekern.fused_experts(x, found.experts, (ids + shift) % 32, weights, shared=found.shared)
    grown = private_bytes() - before
    assert grown < 64 * MIB < size / 4, f"{grown / MIB:.1f} MiB more after a layer with {size / MIB:.0f} MiB of weights"


def test_a_checkpoint_read_back(make_checkpoint: ModuleType, tmp_path: Path) -> None:
    layer = LAYERS["deepseek-v3"].scaled_down(28, experts=3)  # 256 and 73: ragged
    make_checkpoint.make(tmp_path, layer, layers=2, first=1)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.moe_layers() == [1, 2] and len(list(tmp_path.glob("*.safetensors"))) == 2
    found = checkpoint.moe_layer(2)
    assert found.gate.shape == (3, layer.hidden) and found.gate.dtype == torch.bfloat16
    assert found.correction_bias is not None and found.correction_bias.shape == (3,)
    assert found.shared is not None and found.shared.num_experts == 1
    assert found.experts.num_experts == 3 and found.experts.intermediate_size == layer.intermediate
    with safe_open(tmp_path / "model-00002-of-00002.safetensors", framework="pt") as file:
        for e in range(3):
            for which, name in enumerate(("gate_proj", "up_proj", "down_proj")):
                key = f"model.layers.2.mlp.experts.{e}.{name}.weight"
                matrix, bias = found.experts.projections()[e][which]
                assert bias is None and torch.equal(matrix.scale, file.get_tensor(f"{key}_scale_inv"))
                assert torch.equal(matrix.data.view(torch.uint8), file.get_tensor(key).view(torch.uint8))


def matrices(prefix: str, names: tuple[str, ...], suffix: str, grid: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for e in range(2):
        for name, rows, columns in zip(names, (96, 96, 140), (140, 140, 96), strict=True):
            q, s = moekern.per_block_cast_to_fp8(torch.randn(rows, columns))
            scale = {"blocks": s, "rows": torch.rand(rows, 1).bfloat16(), "one": torch.rand(1).bfloat16()}[grid]
            tensors |= {f"{prefix}.{e}.{name}.weight": q, f"{prefix}.{e}.{name}.{suffix}": scale}
    return tensors


@pytest.mark.parametrize("grid", ["blocks", "rows", "one"])
@pytest.mark.parametrize("suffix", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize(
    ("block", "names"),
    [("mlp", ("gate_proj", "up_proj", "down_proj")), ("block_sparse_moe", ("w1", "w3", "w2"))],
)
def test_names(tmp_path: Path, block: str, names: tuple[str, ...], suffix: str, grid: str) -> None:
    """DeepSeek's and Mixtral's, with scales as either writes them; compressed-tensors has some in bf16."""
    tensors = matrices(f"model.layers.7.{block}.experts", names, suffix, grid)
    tensors[f"model.layers.7.{block}.gate.weight"] = torch.randn(2, 140)
    save_file(tensors, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        layer = Checkpoint(path).moe_layer(7)
        assert layer.shared is None and layer.correction_bias is None
        for e, projections in enumerate(layer.experts.projections()):
            for name, (matrix, _) in zip(names, projections, strict=True):
                weight = tensors[f"model.layers.7.{block}.experts.{e}.{name}.weight"]
                scale = tensors[f"model.layers.7.{block}.experts.{e}.{name}.{suffix}"]
                assert torch.equal(matrix.to_float64(), moekern.ScaledTensor(weight, scale.float()).to_float64())
        x, ids = torch.randn(3, 140), torch.tensor([[0], [1], [0]])
        assert moekern.fused_experts(x, layer.experts, ids).isfinite().all()


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=INDEX):
        Checkpoint(tmp_path)
    tensors = matrices("model.layers.7.mlp.experts", ("gate_proj", "up_proj", "down_proj"), "weight_scale", "blocks")
    tensors["model.layers.7.mlp.gate.weight"] = torch.randn(2, 140)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"layer is 6, but the checkpoint has experts in the layers \[7\]"):
        Checkpoint(tmp_path).moe_layer(6)
    with pytest.raises(KeyError, match=r"no tensor model\.embed"):
        Checkpoint(tmp_path).tensor("model.embed")
    missing = {name: t for name, t in tensors.items() if ".experts.0." not in name}
    save_file(missing, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"experts \[1\]"):
        Checkpoint(tmp_path).moe_layer(7)
    for name in list(tensors):
        if name.endswith("experts.1.up_proj.weight_scale"):
            del tensors[name]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(TypeError, match=r"experts\.1\.up_proj\.weight has dtype torch\.float8_e4m3fn and no scale"):
        Checkpoint(tmp_path).moe_layer(7)


def test_without_safetensors() -> None:
    body = (
        "import sys; sys.modules['safetensors'] = None\n"
        "import moekern.checkpoint\n"
        "try: moekern.checkpoint.Checkpoint('.')\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, check=True)
    assert "pip install safetensors" in done.stdout


def test_the_script(tmp_path: Path) -> None:
    pytest.importorskip("typer")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "made")]
    options = ["--config", "qwen3-30b-a3b", "--layers", "2", "--experts", "4", "--divisor", "8"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    layer = Checkpoint(tmp_path / "made").moe_layer(1)
    assert layer.experts.num_experts == 4 and layer.experts.hidden_size == 256 and layer.shared is None
    refused = subprocess.run([*command, "--config", "gpt-oss-like"], capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2 and "--config" in refused.stderr
