"""`python -m moekern warmup`: the sizes of models, and that no launch compiles what was compiled for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pretended
import pytest
import tiny_models
import torch

from moekern import models

SUITES = Path(__file__).resolve().parents[1] / "bench" / "suites"
WARMED = {"sm_90": (1,), "gfx950": (19,)}  # and how many tokens: by kernels for few rows, and for many


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_sizes_are_those_of_the_modules(name: str) -> None:
    module, model = tiny_models.plain(name), models.read(name, tiny_models.config(name).to_dict())
    linears = {
        (layer.out_features, layer.in_features)
        for path, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear) and path != "lm_head"
    }
    assert linears <= {(linear.n, linear.k) for linear in model.linears}
    experts = {path.rpartition(".")[2]: p.shape for path, p in module.named_parameters() if ".experts." in path}
    assert (model.experts is not None) == (name in tiny_models.OF_EXPERTS)
    if model.experts is not None:
        of = model.experts
        assert experts["gate_up_proj"] == (of.count, 2 * of.intermediate, of.hidden)
        assert experts["down_proj"] == (of.count, of.hidden, of.intermediate)
        assert of.top_k == module.config.num_experts_per_tok


@pytest.mark.parametrize(
    ("name", "suite"),
    [("deepseek-v3", "deepseek-v3"), ("qwen3-30b-a3b", "qwen3-30b-a3b"), ("mixtral-8x7b", "mixtral")],
)
def test_published_sizes_are_those_of_the_benchmark(name: str, suite: str) -> None:
    model = models.load(name)
    assert model.experts is not None
    found = {(linear.n, linear.k) for linear in model.linears}
    size, hidden = model.experts.intermediate, model.experts.hidden
    found |= {(2 * size, hidden), (hidden, size)}
    assert {(row["n"], row["k"]) for row in json.loads((SUITES / f"{suite}.json").read_text())["linears"]} <= found


def test_a_checkpoint(tmp_path: Path) -> None:
    tiny_models.write("deepseek-v3", tmp_path)
    read = models.load(str(tmp_path))
    assert read.linears == models.load(str(tmp_path / "config.json")).linears and read.block == (128, 128)
    of = read.experts
    assert of is not None and (of.groups, of.kept_groups, of.scoring, of.correction_bias) == (2, 1, "sigmoid", True)


@pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
def test_what_is_no_model_is_said(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        models.load(str(path))


TINY = {
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "num_attention_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
}


def command(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    import os

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    return subprocess.run(
        [sys.executable, "-m", "moekern", "warmup", *arguments], capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize(
    ("arguments", "variables", "told"),
    [
        (("--config", "nonsense"), {}, "deepseek-v3"),
        (("--config", "mixtral-8x7b", "--target", "sm_1"), {}, "sm_90"),
        (("--config", "mixtral-8x7b", "--device", "cuda:99"), {}, "cuda:99"),
        (("--config", "mixtral-8x7b", "--target", "sm_90", "--tokens", "1,x"), {}, "1,16,4096"),
        (("--config", "mixtral-8x7b", "--target", "sm_90"), {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET"),
    ],
)
def test_what_cannot_be_done_is_said(arguments: tuple[str, ...], variables: dict[str, str], told: str) -> None:
    pytest.importorskip("triton")
    done = command(*arguments, **variables)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_device_targets_are_told() -> None:
    pytest.importorskip("triton")
    done = command("--config", "mixtral-8x7b")
    assert done.returncode == 2 and "no GPU is here" in done.stderr and "gfx942" in done.stderr


def layer(target: str, rows: tuple[int, ...]) -> list[tuple[str, bool]]:
    """(kernel, whether it was on disk) of all that a layer launches, on tensors as users have them."""
    from triton import knobs

    import moekern
    from moekern.backends._triton import ahead, warmup
    from moekern.backends._triton.kernels import kernels, taking
    from moekern.backends._triton.targets import TARGETS

    found: list[tuple[str, bool]] = []
    knobs.compilation.listener = lambda *, src, cache_hit, **rest: found.append((src.name, cache_hit))
    known = list(kernels(warmup.family_of(TARGETS[target])))

    def call(op: Any, *operands: Any, **options: Any) -> Any:
        prepared = op.prepare(*operands, **options)
        with ahead.active(pretended.driver(target)):
            taking(known, op, prepared).run(*prepared)
        return prepared[op.output_index]

    def cast(shape: tuple[int, ...]) -> moekern.ScaledTensor:
        grid = (*shape[:-2], shape[-2] // 128, shape[-1] // 128)
        return moekern.ScaledTensor(torch.zeros(shape).to(torch.float8_e4m3fn), torch.ones(grid), (128, 128))

    for tokens in rows:
        x = torch.randn(tokens, 256).bfloat16()
        call(moekern.fp8_gemm_nt, call(moekern.per_token_cast_to_fp8, x), cast((768, 256)), out_dtype=torch.bfloat16)
        routing = call(moekern.moe_gate, torch.randn(tokens, 4), 2, renormalize=True)
        routing.ids.copy_(torch.tensor([0, 1]))
        w13, w2 = cast((4, 256, 256)), cast((4, 256, 128))
        shared = moekern.ExpertWeights(cast((1, 256, 256)), cast((1, 256, 128)))
        experts = moekern.ExpertWeights(w13, w2)
        for beside in (None, shared):
            call(
                moekern.fused_experts, x, experts, routing.ids, routing.weights, quantize_activations=True,
                shared=beside,
            )  # fmt: skip
        call(moekern.moe_permute, x, routing.ids, 4, format="e4m3fn")
        rows, layout, inverse = call(moekern.moe_permute, x, routing.ids, 4)
        inverse.zero_()
        of_rows = call(moekern.per_token_cast_to_fp8, rows)
        h = call(moekern.m_grouped_fp8_gemm_nt_contiguous, of_rows, w13, layout, out_dtype=torch.bfloat16)
        h = call(moekern.silu_mul_cast_to_fp8, h)
        y = call(moekern.m_grouped_fp8_gemm_nt_contiguous, h, w2, layout, out_dtype=torch.bfloat16)
        call(moekern.moe_unpermute, y, inverse, routing.weights)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("target", "tokens"), WARMED.items())
def test_what_was_compiled_is_found(target: str, tokens: tuple[int, ...], tmp_path: Path) -> None:
    pytest.importorskip("triton")
    path, cache = tmp_path / "config.json", tmp_path / "cache"
    path.write_text(json.dumps(TINY))
    done = command(
        "--config", str(path), "--target", target, "--tokens", ",".join(map(str, tokens)), "--activations", "fp8",
        TRITON_CACHE_DIR=str(cache),
    )  # fmt: skip
    assert done.returncode == 0 and " 0 found, 0 calls failed" in done.stdout, done.stdout + done.stderr
    found = pretended.apart(cache, layer, target, tokens)
    assert {name for name, _ in found} >= {"gemm_kernel", "gate_up_kernel", "m_grouped_kernel", "unpermute_kernel"}
    assert [name for name, cached in found if not cached] == []
