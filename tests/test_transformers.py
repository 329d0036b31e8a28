"""transformers models with moekern's kernels: what stays FP8, what each layer computes, what is undone."""

from __future__ import annotations

import contextlib
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations import finegrained_fp8 as fp8

import moekern
import moekern.integrations.transformers as ours
from moekern import ExpertWeights, ScaledTensor
from moekern.integrations.compressed_tensors import block_fp8
from moekern.onnx.checkpoint import Logits
from moekern.testing.expert_numerics import experts_oracle
from moekern.testing.numerics import check_bound, gemm_oracle

pytestmark = pytest.mark.slow
RELEASE = tuple(int(part) for part in importlib.metadata.version("transformers").split(".")[:2])
quantizes = pytest.mark.skipif(
    RELEASE < ours.QUANTIZES, reason="this transformers rounds to FP8 before it knows the scales"
)
IDS = torch.arange(12).view(2, 6) * 23 % 512
FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tiny_models.write(name, tmp_path_factory.mktemp(name)) for name in tiny_models.NAMES}


@pytest.fixture(autouse=True)
def _uninstalled() -> Iterator[None]:
    yield
    ours.uninstall()


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()


def fused(name: str) -> dict[str, str]:
    """Options with which a model that has experts takes moekern's."""
    return {"experts_implementation": "moekern"} if name in tiny_models.OF_EXPERTS else {}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).float().norm() / b.float().norm()).item()


def calls(model: Any, kind: type) -> dict[str, tuple[tuple[Any, ...], torch.Tensor]]:
    """The operands and the result of every module of a kind, in one forward of the model."""
    found = {}
    hooks = [
        module.register_forward_hook(lambda _, args, out, name=name: found.update({name: (args, out)}))
        for name, module in model.named_modules()
        if isinstance(module, kind)
    ]
    logits(model)
    for hook in hooks:
        hook.remove()
    return found


# ---- layers, against what the checkpoint's own tensors say ---------------------------------------------


@pytest.mark.parametrize("quantized", [False, True], ids=["w8a16", "w8a8"])
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_linear_layers(folders: dict[str, Path], name: str, quantized: bool) -> None:
    tensors = load_file(folders[name] / "model.safetensors")
    with ours.install(quantize_activations=quantized):
        found = calls(load(folders[name]), fp8.FP8Linear)
    assert found
    for layer, ((x,), out) in found.items():
        rows = x.reshape(-1, x.shape[-1])
        weight = ScaledTensor(tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale_inv"], (128, 128))
        a = moekern.per_token_cast_to_fp8(rows) if quantized else rows
        check_bound(out.reshape(len(rows), -1), gemm_oracle(moekern.fp8_gemm_nt, a, weight))


def test_grouped_linear() -> None:
    """Groups of columns with a matrix each; no model here has one."""
    module = fp8.FP8GroupedLinear(200, 3 * 128, n_groups=3, block_size=(128, 128))
    weights = [moekern.per_block_cast_to_fp8(torch.randn(128, 200)) for _ in range(3)]
    module.weight = torch.nn.Parameter(torch.cat([w.data for w in weights]), requires_grad=False)
    module.weight_scale_inv = torch.nn.Parameter(torch.cat([w.scale for w in weights]))
    x = torch.randn(2, 5, 3, 200)
    with torch.no_grad(), ours.install():
        out = module(x)
    for group, weight in enumerate(weights):
        check_bound(
            out[:, :, group].reshape(10, 128),
            gemm_oracle(moekern.fp8_gemm_nt, x[:, :, group].reshape(10, 200), weight),
        )


def experts_of(tensors: dict[str, torch.Tensor], layer: str) -> ExpertWeights:
    layer = layer.replace(".mlp.experts", ".block_sparse_moe.experts") if _is_mixtral(tensors) else layer
    names = ("w1", "w3", "w2") if _is_mixtral(tensors) else ("gate_proj", "up_proj", "down_proj")
    parts = [
        [
            ScaledTensor(
                tensors[f"{layer}.{e}.{part}.weight"], tensors[f"{layer}.{e}.{part}.weight_scale_inv"], (128, 128)
            )
            for e in range(8)
        ]
        for part in names
    ]
    return ExpertWeights.separate(*parts)


def _is_mixtral(tensors: dict[str, torch.Tensor]) -> bool:
    return any("block_sparse_moe" in key for key in tensors)


@pytest.mark.parametrize("quantized", [False, True], ids=["w8a16", "w8a8"])
@pytest.mark.parametrize("name", tiny_models.OF_EXPERTS)
def test_experts(folders: dict[str, Path], name: str, quantized: bool) -> None:
    tensors = load_file(folders[name] / "model.safetensors")
    with ours.install(quantize_activations=quantized):
        found = calls(load(folders[name], experts_implementation="moekern"), fp8.FP8Experts)
    assert found
    for layer, ((x, ids, weights), out) in found.items():
        oracle = experts_oracle(x, experts_of(tensors, layer), ids, weights.float(), quantize_activations=quantized)
        check_bound(out, oracle)


@pytest.mark.parametrize("name", tiny_models.OF_EXPERTS)
def test_every_implementation_of_experts(folders: dict[str, Path], name: str) -> None:
    with ours.install():
        model = load(folders[name], experts_implementation="eager")
        expected = logits(model)
        for implementation in ("grouped_mm", "batched_mm", "moekern"):
            model.set_experts_implementation(implementation)
            # transformers rounds to bf16 after each product, the fused form does not, and routing may flip
            assert difference(logits(model), expected) < 0.02, implementation


@pytest.mark.parametrize("kind", ["Qwen3MoeConfig", "GptOssConfig"])  # gpt-oss: biases, transposed, interleaved
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_experts_that_are_not_fp8(kind: str, dtype: torch.dtype) -> None:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 48, "intermediate_size": 48, "vocab_size": 512}
    more = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    experts = {"num_local_experts": 6, "num_experts": 6, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        getattr(transformers, kind)(**sizes, **more, **experts), dtype=dtype
    ).eval()
    with torch.no_grad(), ours.install():
        for parameter in model.parameters():
            parameter.normal_(0, 0.05)
        model.set_experts_implementation("eager")
        expected = logits(model)
        model.set_experts_implementation("moekern")
        assert difference(logits(model), expected) < (0.03 if dtype == torch.bfloat16 else 1e-5)


@quantizes
def test_gpt_oss_has_fp8_attention_beside_bf16_experts(tmp_path: Path) -> None:
    """transformers has no FP8 form of its experts."""
    sizes = {"hidden_size": 200, "intermediate_size": 96, "vocab_size": 512, "num_hidden_layers": 2, "head_dim": 48}
    more = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 6, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(transformers.GptOssConfig(**sizes, **more), dtype=torch.bfloat16).eval()
    plain.save_pretrained(tmp_path)
    settings = FineGrainedFP8Config(modules_to_not_convert=["mlp.experts", "mlp.router", "lm_head"])
    with ours.install():
        model = load(tmp_path, quantization_config=settings, experts_implementation="moekern")
        assert model.model.layers[0].self_attn.q_proj.weight.dtype == FP8
        assert model.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.bfloat16
        assert difference(logits(model), logits(plain)) < 0.1


# ---- models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_weights_stay_fp8_and_generate(folders: dict[str, Path], name: str) -> None:
    in_file = {key for key, value in load_file(folders[name] / "model.safetensors").items() if value.dtype == FP8}
    with ours.install():
        model = load(folders[name], **fused(name))
        kept = sum(p.numel() for p in model.parameters() if p.dtype == FP8)
        assert kept == sum(load_file(folders[name] / "model.safetensors")[key].numel() for key in in_file)
        tokens = model.generate(IDS, max_new_tokens=5, do_sample=False)
    assert tokens.shape == (2, IDS.shape[1] + 5)


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_saving_gives_the_same_bytes(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    with ours.install():
        load(folders[name]).save_pretrained(tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (folders[name], tmp_path))
    assert before.keys() == after.keys()
    for key, value in before.items():
        again = after[key]
        if f"{key}_scale_inv" in before or key.endswith("_scale_inv"):
            assert value.dtype == again.dtype
            value, again = value.view(torch.uint8), again.view(torch.uint8)
        assert torch.equal(value.float(), again.float()), key  # router biases may come back in f32


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_compressed_tensors(name: str, tmp_path: Path) -> None:
    """Its names are read, and what is saved has them too and loads again."""
    (tmp_path / "before").mkdir()
    folder = tiny_models.write(name, tmp_path / "before", compressed_tensors=True)
    with ours.install():
        model = load(folder)
        assert any(p.dtype == FP8 for p in model.parameters())
        before, after = (load_file(folder / "model.safetensors"), tmp_path / "after")
        model.save_pretrained(after)
        found = calls(load(after, **fused(name)), fp8.FP8Linear)
    saved = load_file(after / "model.safetensors")
    assert before.keys() == saved.keys()
    for layer, ((x,), out) in found.items():
        weight = ScaledTensor(before[f"{layer}.weight"], before[f"{layer}.weight_scale"], (128, 128))
        rows = x.reshape(-1, x.shape[-1])
        check_bound(out.reshape(len(rows), -1), gemm_oracle(moekern.fp8_gemm_nt, rows, weight))
    assert all(torch.equal(before[key].float(), saved[key].float()) for key in before)


@pytest.mark.parametrize(
    "weights",
    [
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128], "symmetric": False},
    ],
)
def test_other_compressed_tensors_stay_with_transformers(weights: dict[str, Any]) -> None:
    assert block_fp8({"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}) is None


@pytest.mark.parametrize("name", ["deepseek-v3", "qwen3"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "moekern"])
def test_gradient_of_the_input(folders: dict[str, Path], name: str, implementation: str) -> None:
    """As of the dequantised model: adapters train over frozen FP8 weights."""
    experts = {} if name == "qwen3" else {"experts_implementation": implementation}

    def gradient(model: Any) -> torch.Tensor:
        x = model.get_input_embeddings()(IDS).detach().float().requires_grad_()
        model(inputs_embeds=x.to(torch.bfloat16)).logits.float().logsumexp(-1).sum().backward()
        return x.grad

    with ours.install():
        got = gradient(load(folders[name], **experts).requires_grad_(False))
    expected = gradient(tiny_models.dequantized(name, folders[name]).requires_grad_(False))
    assert got.isfinite().all()
    assert difference(got, expected) < 0.1  # bf16 throughout, and routing may flip


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_one_graph_for_every_shape(folders: dict[str, Path], name: str) -> None:
    torch.compiler.reset()
    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    with ours.install(), torch.no_grad():
        model = load(folders[name], **fused(name))
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
        for rows, columns in ((2, 11), (3, 7), (2, 6), (4, 9)):
            ids = (torch.arange(rows * columns) * 31 % 512).view(rows, columns)
            got, expected = (m(ids, use_cache=False).logits for m in (compiled, model))
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert graphs == 1


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_export(folders: dict[str, Path], name: str) -> None:
    auto = torch.export.Dim.AUTO
    with ours.install(), torch.no_grad():
        model = Logits(load(folders[name], **fused(name)))
        exported = torch.export.export(model, (IDS,), dynamic_shapes=({0: auto, 1: auto},), strict=False).module()
        for rows, columns in ((2, 6), (3, 9), (5, 4)):
            ids = (torch.arange(rows * columns) * 31 % 512).view(rows, columns)
            torch.testing.assert_close(exported(ids), model(ids), rtol=0, atol=0)


@quantizes
@pytest.mark.parametrize("name", tiny_models.NAMES)
@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_quantising_while_loading(name: str, scale_fmt: str, tmp_path: Path) -> None:
    tiny_models.plain(name).save_pretrained(tmp_path / "bf16")
    original = load_file(tmp_path / "bf16" / "model.safetensors")
    wanted = FineGrainedFP8Config(weight_block_size=(128, 128), scale_fmt=scale_fmt)
    with ours.install():
        model = load(tmp_path / "bf16", quantization_config=wanted)
        model.save_pretrained(tmp_path / "fp8")
        again = load(tmp_path / "fp8")
        # FP8's own error, and routing that flips for it
        assert difference(logits(model), logits(tiny_models.plain(name).eval())) < 0.5
    saved = load_file(tmp_path / "fp8" / "model.safetensors")
    projections = [key for key in original if tiny_models.PROJECTION.search(key)]
    assert projections == [key for key in saved if tiny_models.PROJECTION.search(key)]
    assert all(f"{key}_scale_inv" in saved for key in projections)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, fp8.FP8Linear)]
    assert layers
    for layer, module in layers:
        data, scale = moekern.per_block_cast_to_fp8(original[f"{layer}.weight"], round_scale_up=scale_fmt == "ue8m0")
        assert torch.equal(module.weight.view(torch.uint8), data.view(torch.uint8)), layer
        assert torch.equal(module.weight_scale_inv.float(), scale), layer
    for (key, before), after in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(before.view(torch.uint8), after.view(torch.uint8)), key


@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe"])
def test_example(folders: dict[str, Path], name: str) -> None:
    script = Path(__file__).parents[1] / "examples" / "generate_fp8_cpu.py"
    command = [sys.executable, str(script), str(folders[name]), "--prompt", "moe", "--tokens", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "1 rows: fp8_gemm_nt on cpu" in done.stdout
    assert "[109, 111, 101, " in done.stdout
    assert "0.0 M of" not in done.stdout


# ---- installing --------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA transformers keeps FP8")
def test_without_it_transformers_dequantises() -> None:
    from transformers.quantizers.auto import AutoHfQuantizer

    for inside in (True, False):
        config = FineGrainedFP8Config(weight_block_size=(128, 128))
        with ours.install() if inside else contextlib.nullcontext():
            AutoHfQuantizer.from_config(config, pre_quantized=True).validate_environment()
        assert config.dequantize is not inside


def test_install_is_idempotent_and_reversible() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    def state() -> tuple[Any, ...]:
        names = [set(registry) for registry in (fp8.ALL_FP8_EXPERTS_FUNCTIONS, ALL_EXPERTS_FUNCTIONS)]
        settings = AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"]
        return fp8._FINEGRAINED_FP8, AUTO_QUANTIZER_MAPPING["fp8"], settings, *names

    before = state()
    ours.install()
    once = state()
    assert once != before
    ours.install(quantize_activations=True)
    assert state() == once
    ours.uninstall()
    ours.uninstall()
    assert state() == before


@pytest.mark.parametrize(("version", "message"), [("4.57.6", "lacks the hooks"), ("6.1.0", "allow_untested=True")])
def test_other_releases_are_refused(monkeypatch: pytest.MonkeyPatch, version: str, message: str) -> None:
    monkeypatch.setattr("transformers.__version__", version)  # of the module there is now: it is replaced at times
    with pytest.raises(ImportError, match=message):
        ours.install()
    assert not ours.installed()


def test_fp4_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="no FP4"):
        ours.matmul(torch.ones(1, 256), torch.zeros(8, 128, dtype=torch.int8), torch.ones(8, 8), [128, 128])


def test_static_activations() -> None:
    x, weight = torch.randn(3, 256), moekern.per_block_cast_to_fp8(torch.randn(40, 256))
    for quantized in (False, True):
        with ours.install(quantize_activations=quantized):
            y = ours.matmul(x, weight.data, weight.scale, [128, 128], activation_scale=torch.tensor(0.01))
        torch.testing.assert_close(y.double(), x.double() @ weight.to_float64().T, rtol=0.1, atol=1.5)
