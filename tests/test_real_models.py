"""Real weights and real text: SmolLM2, a mixture of experts made of it, all-MiniLM; through the examples."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

import moekern
from moekern.checkpoint import Checkpoint
from moekern.integrations import real_models
from moekern.testing.expert_numerics import experts_oracle
from moekern.testing.numerics import check_bound

NEEDED = ("gguf", real_models.SMOLLM2, real_models.MINILM)
if missing := [package for package in NEEDED if importlib.util.find_spec(package) is None]:
    pytest.skip(f"needs {', '.join(missing)}: {real_models.INSTALL}", allow_module_level=True)

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.append(str(EXAMPLES))
import embed_fp8_cpu  # noqa: E402
import smollm2_fp8  # noqa: E402

TOKENS = 8
NAMES = ("f32", "W8A16", "W8A8")  # not bf16, at which CPUs without its instructions take minutes


class Run(NamedTuple):
    folder: Path
    results: dict[str, smollm2_fp8.Result]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    found = {}
    model, tokenizer = real_models.smollm2()  # reading the GGUF file takes half a minute
    for kind in ("dense", "experts"):
        folder = tmp_path_factory.mktemp(kind)
        with mock.patch.object(real_models, "smollm2", lambda: (copy.deepcopy(model), tokenizer)):
            results = smollm2_fp8.compare(folder, experts=kind == "experts", tokens=TOKENS, names=NAMES)
        found[kind] = Run(folder, {result.name: result for result in results})
    return found


@pytest.mark.parametrize(("name", "at_most"), [("W8A16", 1.02), ("W8A8", 1.05)])
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_perplexity(runs: dict[str, Run], kind: str, name: str, at_most: float) -> None:
    results = runs[kind].results
    assert 20 < results["f32"].perplexity < 30
    assert results[name].perplexity < at_most * results["f32"].perplexity


@pytest.mark.parametrize("name", ["W8A16", "W8A8"])
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_text(runs: dict[str, Run], kind: str, name: str) -> None:
    """Greedy text parts from f32's sooner or later; at random it would be another from the first of 49152 tokens."""
    exact, got = runs[kind].results["f32"].tokens, runs[kind].results[name].tokens
    alike = [next((i for i in range(TOKENS) if a[i] != b[i]), TOKENS) for a, b in zip(exact, got, strict=True)]
    assert sum(alike) > 0.25 * TOKENS * len(exact), alike


def test_weights_stay_fp8(runs: dict[str, Run]) -> None:
    for run in runs.values():
        for name in ("W8A16", "W8A8"):
            result = run.results[name]
            assert result.fp8 > 100e6
            assert run.results["f32"].bytes / 2 - result.bytes == pytest.approx(result.fp8, rel=0.01)


def test_the_experts_compute_what_the_mlps_did(runs: dict[str, Run]) -> None:
    dense, experts = (runs[kind].results["f32"] for kind in ("dense", "experts"))
    assert experts.perplexity == pytest.approx(dense.perplexity, rel=1e-3)


class Experts(NamedTuple):
    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    out: torch.Tensor  # of the routed experts
    block: Any  # the whole module


@pytest.fixture(scope="module")
def layers(runs: dict[str, Run]) -> dict[int, Experts]:
    """What the experts of some layers got and gave for the page."""
    found = {}
    [(_, model)] = smollm2_fp8.models(runs["experts"].folder, experts=True, names=("W8A16",))
    for layer in (1, 15, 29):
        block = model.model.layers[layer].mlp
        block.experts.register_forward_hook(
            lambda _, args, out, layer=layer, block=block: found.update({layer: Experts(*args, out, block)})
        )
    tokenizer = smollm2_fp8.AutoTokenizer.from_pretrained(runs["experts"].folder / "fp8")
    with torch.no_grad(), smollm2_fp8.moekern_transformers.install():
        model(tokenizer(smollm2_fp8.PAGE.read_text(), return_tensors="pt").input_ids)
    return found


def test_experts_on_real_text(runs: dict[str, Run], layers: dict[int, Experts]) -> None:
    """Against the float64 reference with the tensors that are in the file, the routing being the model's own."""
    checkpoint = Checkpoint(runs["experts"].folder / "fp8")
    assert checkpoint.moe_layers() == list(range(1, 30))
    for layer, (x, ids, weights, out, _) in layers.items():
        assert len(ids.unique()) >= 4, "every token has gone to the same experts"
        check_bound(out, experts_oracle(x, checkpoint.moe_layer(layer).experts, ids, weights.float()))


def test_a_layer_from_the_file_alone(runs: dict[str, Run], layers: dict[int, Experts]) -> None:
    """As an engine of its own would run it: router, experts and shared expert, in moekern's two calls."""
    checkpoint = Checkpoint(runs["experts"].folder / "fp8")
    for layer, (x, ids, weights, _, block) in layers.items():
        stored = checkpoint.moe_layer(layer)
        routing = moekern.moe_gate(
            x.float() @ stored.gate.float().T,
            2,
            scoring="sigmoid",
            correction_bias=stored.correction_bias.float(),
            renormalize=True,
            routed_scaling_factor=2.0,
        )
        assert torch.equal(routing.ids.long().sort().values, ids.sort().values)
        torch.testing.assert_close(routing.weights, weights.float(), rtol=1e-5, atol=1e-6)
        out = moekern.fused_experts(x, stored.experts, routing.ids, routing.weights, shared=stored.shared)
        with torch.no_grad(), smollm2_fp8.moekern_transformers.install():
            expected = block(x.unsqueeze(0))[0]
        assert (out - expected).float().norm() < 0.01 * expected.float().norm()  # it rounds to bf16 more often


@pytest.mark.parametrize("quantized", [False, True], ids=["w8a16", "w8a8"])
def test_sentences(quantized: bool) -> None:
    f32, fp8 = embed_fp8_cpu.embed(embed_fp8_cpu.SENTENCES, quantized)
    assert (f32 * fp8).sum(1).min() > 0.99
    assert embed_fp8_cpu.nearest(fp8) == embed_fp8_cpu.nearest(f32) == [1, 0, 3, 2, 5, 4, 7, 6]


def test_adding_a_kernel() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "add_a_kernel.py")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "is within the bounds" in done.stdout
    assert "decodes all weights first, which pays from 64 rows" in done.stdout
