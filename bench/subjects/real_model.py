"""A real language model with every linear layer in FP8: error of each layer, next tokens, speed.

SmolLM2-135M-Instruct, whose hidden size, 576, is 4.5 blocks of 128, so that every scale grid is ragged.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import packages
import torch
from report import bare_table, duration, spread
from rich.console import Console
from rich.table import Table
from timing.measure import Contender, Samples, interleave
from timing.problems import sampled_error
from torch import nn
from torch.nn import functional as F

from moekern import ScaledTensor, fp8_gemm_nt, per_block_cast_to_fp8, per_token_cast_to_fp8
from moekern.integrations import real_models

PAGE = Path(__file__).parents[1] / "data" / "page.txt"
PACKAGES = ("transformers", "gguf", "accelerate", real_models.SMOLLM2)


def missing() -> str | None:
    return packages.missing("--real", PACKAGES, real_models.INSTALL)


class Fp8Linear(nn.Module):
    """nn.Linear with 128x128-scaled FP8 weights; W8A8 casts its input to 1x128 FP8 first."""

    def __init__(self, weight: ScaledTensor, bias: torch.Tensor | None, cast: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.cast = weight, bias, cast

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        a = per_token_cast_to_fp8(rows) if self.cast else rows
        return fp8_gemm_nt(a, self.weight, bias=self.bias, out_dtype=x.dtype).reshape(*x.shape[:-1], -1)


Linears = dict[str, nn.Linear]


def linears(model: nn.Module) -> Linears:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def with_fp8(model: nn.Module, weights: dict[str, ScaledTensor], cast: bool) -> nn.Module:
    model = copy.deepcopy(model)
    for name, linear in linears(model).items():
        model.set_submodule(name, Fp8Linear(weights[name], linear.bias, cast))
    return model


def load() -> tuple[nn.Module, torch.Tensor, str]:
    """The model in f32, the page's tokens [1, T], and a continuation of a prompt as a sign of life."""
    if reason := missing():
        raise packages.Missing(reason)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no option turns off
        model, tokenizer = real_models.smollm2()
    tokens = tokenizer(PAGE.read_text(), return_tensors="pt").input_ids
    prompt = "The capital of France is"
    word = tokenizer.decode(model(tokenizer(prompt, return_tensors="pt").input_ids).logits[0, -1].argmax())
    return model, tokens, f"{prompt!r} -> {word!r}"


def hidden_states(model: nn.Module, tokens: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Input [T, K] and output [T, N] of every linear layer over the page."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            seen[name] = (args[0].reshape(-1, args[0].shape[-1]), output.reshape(-1, output.shape[-1]))

        return hook

    hooks = [linear.register_forward_hook(keep(name)) for name, linear in linears(model).items()]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return seen


def _relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got - exact).square().mean() / exact.square().mean()).sqrt().item()


def layer_errors(
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]], weights: dict[str, ScaledTensor]
) -> dict[str, dict[str, float]]:
    """Relative rms error of every layer: against f32, and of the kernel alone (its own operands in float64)."""
    errors: dict[str, dict[str, float]] = {}
    for name, (x, exact) in seen.items():
        errors[name] = {}
        for kind, a in (("W8A16", x.bfloat16()), ("W8A8", per_token_cast_to_fp8(x.bfloat16()))):
            out = fp8_gemm_nt(a, weights[name], out_dtype=torch.float32)
            errors[name][kind] = _relative(out, exact)
            errors[name][f"{kind} kernel"] = sampled_error(out, {"a": a, "b": weights[name]})
    return errors


def _errors_table(errors: dict[str, dict[str, float]], weights: dict[str, ScaledTensor]) -> Table:
    table = bare_table("error of each linear layer on the page's hidden states, relative rms against f32")
    for name in ("layers", "N × K"):
        table.add_column(name, no_wrap=True)
    for name in ("W8A16 median", "worst", "W8A8 median", "worst", "kernel alone, worst"):
        table.add_column(name, justify="right", no_wrap=True)
    kinds: dict[str, list[str]] = {}
    for name in errors:
        kinds.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    for kind, names in kinds.items():
        n, k = weights[names[0]].shape
        cells = [f"{len(names)} {kind}", f"{n} × {k}"]
        for what in ("W8A16", "W8A8"):
            values = torch.tensor([errors[name][what] for name in names])
            cells += [f"{100 * values.median().item():.2f}%", f"{100 * values.max().item():.2f}%"]
        alone = max(errors[name][f"{what} kernel"] for name in names for what in ("W8A16", "W8A8"))
        table.add_row(*cells, f"{alone:.1e}")
    return table


def _next_token(model: nn.Module, tokens: torch.Tensor) -> Callable[[int], Any]:
    """One more token after the page, whose keys and values are cached."""
    cache = model(tokens, use_cache=True).past_key_values
    last = tokens[:, -1:]

    def step(turn: int) -> None:
        model(last, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def speed(
    models: dict[str, nn.Module], plain: Linears, weights: dict[str, ScaledTensor], tokens: torch.Tensor, budget: float
) -> dict[str, dict[str, Samples]]:
    """Seconds of one token and of the page: all linear layers alone, then the whole model."""
    length = tokens.shape[1]
    f32 = [linear.weight for linear in plain.values()]
    bf16 = [weight.bfloat16() for weight in f32]

    def dense(layers: list[torch.Tensor], x: dict[int, torch.Tensor], turn: int) -> None:
        for weight in layers:
            F.linear(x[weight.shape[1]], weight)

    def fp8(cast: bool, x: dict[int, torch.Tensor], turn: int) -> None:
        for weight in weights.values():
            rows = x[weight.shape[1]]
            fp8_gemm_nt(per_token_cast_to_fp8(rows) if cast else rows, weight)

    found = {}
    for label, m in (("1 token", 1), (f"{length} tokens", length)):
        x = {k: torch.randn(m, k) for k in {weight.shape[1] for weight in f32}}
        x16 = {k: value.bfloat16() for k, value in x.items()}
        found[f"all linear layers, {label}"] = interleave(
            [
                Contender("moekern W8A16", partial(fp8, False, x16)),
                Contender("moekern W8A8", partial(fp8, True, x16)),
                Contender("torch bf16", partial(dense, bf16, x16)),
                Contender("torch f32", partial(dense, f32, x)),
            ],
            budget,
        )
    found["whole model, next token"] = interleave(
        [Contender(name, _next_token(model, tokens)) for name, model in models.items()], budget
    )
    found[f"whole model, {length} tokens"] = interleave(
        [Contender(name, partial(_page, model, tokens)) for name, model in models.items()], budget
    )
    return found


def _page(model: nn.Module, tokens: torch.Tensor, turn: int) -> None:
    model(tokens)


def _speed_table(found: dict[str, dict[str, Samples]]) -> Table:
    names = ["moekern W8A16", "moekern W8A8", "torch bf16", "torch f32"]
    table = bare_table("speed")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for what, samples in found.items():
        table.add_row(what, *(f"{duration(samples[name].median)} {spread(samples[name])}" for name in names))
    return table


def run(console: Console, quick: bool) -> dict[str, Any]:
    """Prints the three parts; returns them for the JSON file."""
    model, tokens, sign_of_life = load()
    console.print(f"SmolLM2-135M-Instruct, {sign_of_life}", highlight=False)
    plain = linears(model)
    weights = {name: per_block_cast_to_fp8(linear.weight) for name, linear in plain.items()}
    numel = sum(w.data.numel() for w in weights.values())
    console.print(f"{len(weights)} linear layers, {numel / 1e6:.0f} M weights; a page of {tokens.shape[1]} tokens")
    errors = layer_errors(hidden_states(model, tokens), weights)
    console.print()
    console.print(_errors_table(errors, weights))

    half = copy.deepcopy(model).bfloat16()
    models = {
        "moekern W8A16": with_fp8(half, weights, cast=False),
        "moekern W8A8": with_fp8(half, weights, cast=True),
        "torch bf16": half,
        "torch f32": model,
    }
    logits = {name: each(tokens).logits[0].float() for name, each in models.items()}
    exact, following = logits["torch f32"], tokens[0, 1:]
    table = bare_table("next tokens over the page")
    table.add_column("model")
    for name in ("same next token as f32", "in f32's top 5", "perplexity"):
        table.add_column(name, justify="right")
    agreement = {}
    for name, got in logits.items():
        choice = got.argmax(-1)
        same = (choice == exact.argmax(-1)).float().mean().item()
        top5 = (exact.topk(5).indices == choice[:, None]).any(-1).float().mean().item()
        perplexity = F.cross_entropy(got[:-1], following).exp().item()
        agreement[name] = {"same": same, "top5": top5, "perplexity": perplexity}
        table.add_row(name, f"{100 * same:.1f}%", f"{100 * top5:.1f}%", f"{perplexity:.2f}")
    console.print()
    console.print(table)

    found = speed(models, plain, weights, tokens, budget=0.5 if quick else 2.0)
    console.print()
    console.print(_speed_table(found))
    return {
        "model": sign_of_life,
        "tokens": tokens.shape[1],
        "layers": errors,
        "agreement": agreement,
        "speed": {what: {name: s.to_json() for name, s in samples.items()} for what, samples in found.items()},
    }
