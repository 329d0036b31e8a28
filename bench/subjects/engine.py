"""Slices of real models inside transformers: `python bench/run.py --op model`.

The same weights twice, in FP8 by moekern.integrations.transformers and in bf16 as transformers itself runs them where
there is no GPU. Only layers: neither embeddings of the real size nor an output head, which both routes share. Where
memory is short a model has fewer experts, and as many for each token.
"""

from __future__ import annotations

import contextlib
import gc
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import packages
import psutil
import torch
from report import bare_table, duration, show, spread
from rich.console import Console
from timing.compete import WRONG, Effort
from timing.measure import Contender, Samples, interleave

from subjects import peak_memory

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {  # as published, but for the vocabulary and the number of layers
    "qwen3-30b-a3b": (
        "Qwen3MoeConfig",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
        },
    ),
    "mixtral-8x7b": (
        "MixtralConfig",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    ),
    "deepseek-v3": ("DeepseekV3Config", {"first_k_dense_replace": 0}),
}
PACKAGES, INSTALL = ("transformers", "accelerate"), "pip install 'moekern[transformers]'"
VOCABULARY, CONTEXT = 1024, 64
ROUTES = ("moekern", "transformers")
BF16, FP8 = "bf16", "fp8"  # folders of checkpoints
PREFILL, QUICK_PREFILL = (64, 512), (64,)
LARGEST_DIFFERENCE = 0.3  # rms, relative: FP8's own error in every layer, and routing that flips for it
MEMORY = 0.6  # of what is free, for both models
FEWEST_EXPERTS = 4  # for each that a token takes: so that the next token's are not in a cache


@dataclass
class Result:
    model: str
    what: str
    tokens: int
    ours: Samples
    theirs: Samples

    @property
    def ratio(self) -> float:
        return self.theirs.median / self.ours.median

    def to_json(self) -> dict[str, Any]:
        times = {"moekern": self.ours.to_json(), "transformers": self.theirs.to_json()}
        return {"model": self.model, "what": self.what, "tokens": self.tokens, "ratio": self.ratio, **times}


def run(
    console: Console, names: list[str], depth: int, prefill: tuple[int, ...], effort: Effort
) -> tuple[list[Result], list[str]]:
    if reason := packages.missing("--op model", PACKAGES, INSTALL):
        raise packages.Missing(reason)
    results: list[Result] = []
    notes: list[str] = []
    for name in names:
        config = _config(name, depth)
        experts = _fit(config)
        if experts is None:
            notes.append(f"{name}: no memory for {depth} layers in bf16 and in FP8")
            continue
        with tempfile.TemporaryDirectory() as folder:
            slice = _time(name, config, Path(folder), prefill, effort)
            gc.collect()
            if not slice.difference < LARGEST_DIFFERENCE:
                off = f"hidden states are {slice.difference:.2f} off, relative rms"
                notes.append(f"{WRONG}, not timed: model {name}: {off}")
                continue
            peaks = ", ".join(peak_memory.of(Path(folder) / FP8, route) for route in ROUTES)
        size = f"{slice.ours / 1e9:.2f} GB, {slice.ours / slice.theirs:.2f} of bf16's"
        console.print(f"\n[bold]{name} · {depth} layers · {experts} · {size}")
        table = bare_table()
        for heading in ("", "moekern", "", "tokens/s", "transformers", "", "tokens/s", "ratio"):
            table.add_column(heading, justify="right")
        for r in slice.found:
            columns = ((duration(s.median), spread(s), f"{r.tokens / s.median:.0f}") for s in (r.ours, r.theirs))
            table.add_row(r.what, *(text for column in columns for text in column), f"{r.ratio:.2f}x")
        show(console, table)
        console.print(f"largest resident memory from the FP8 checkpoint to a token: {peaks}", highlight=False)
        results += slice.found
    return results, notes


@dataclass
class Slice:
    ours: int  # bytes of weights
    theirs: int
    difference: float  # of the hidden states, relative rms
    found: list[Result]


def _time(name: str, config: Any, folder: Path, prefill: tuple[int, ...], effort: Effort) -> Slice:
    with _models(config, folder) as models:
        slice = Slice(*map(_bytes, models), _difference(*models), [])
        if slice.difference < LARGEST_DIFFERENCE:
            steps = [_next_token(*each) for each in zip(ROUTES, models, strict=True)]
            slice.found.append(_compare(name, "next token", 1, steps, effort))
            for tokens in prefill:
                prompts = [_prompt(*each, tokens) for each in zip(ROUTES, models, strict=True)]
                slice.found.append(_compare(name, f"prompt of {tokens}", tokens, prompts, effort))
        return slice


def _config(name: str, depth: int) -> Any:
    import transformers

    kind, sizes = CONFIGS[name]
    return getattr(transformers, kind)(vocab_size=VOCABULARY, num_hidden_layers=depth, **sizes)


def _weights(config: Any) -> int:
    from transformers import AutoModel

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModel.from_config(config).parameters())


def _fit(config: Any) -> str | None:
    """Takes experts away until both models fit, and says how many are left; None if none would do."""
    key = next(k for k in ("n_routed_experts", "num_experts", "num_local_experts") if k in config.to_dict())
    whole = getattr(config, key)
    while 3 * _weights(config) > MEMORY * psutil.virtual_memory().available:  # bytes: two a weight in bf16, one in FP8
        if (fewer := getattr(config, key) // 2) < FEWEST_EXPERTS * config.num_experts_per_tok:
            return None
        setattr(config, key, fewer)
    left = getattr(config, key)
    return f"{whole} experts" if left == whole else f"{left} of {whole} experts"


@contextlib.contextmanager
def _models(config: Any, folder: Path) -> Iterator[tuple[Any, Any]]:
    """Ours and theirs; `folder` gets both as checkpoints."""
    from transformers import AutoModel, FineGrainedFP8Config
    from transformers.utils import logging

    import moekern.integrations.transformers as integration

    logging.disable_progress_bar()
    theirs = AutoModel.from_config(config, dtype=torch.bfloat16).eval()
    with integration.install():
        theirs.save_pretrained(folder / BF16)
        settings = FineGrainedFP8Config(weight_block_size=(128, 128))
        options = {"dtype": torch.bfloat16, "quantization_config": settings, "experts_implementation": "moekern"}
        ours = AutoModel.from_pretrained(folder / BF16, **options).eval()
        ours.save_pretrained(folder / FP8)
        shutil.rmtree(folder / BF16)
        yield ours, theirs


def _bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _ids(turn: int, tokens: int) -> torch.Tensor:
    """Other tokens for every turn."""
    return torch.randint(0, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(turn))


def _difference(ours: Any, theirs: Any) -> float:
    a, b = (model(_ids(0, CONTEXT)).last_hidden_state.float() for model in (ours, theirs))
    return ((a - b).norm() / b.norm()).item()


def _compare(name: str, what: str, tokens: int, contenders: list[Contender], effort: Effort) -> Result:
    found = interleave(contenders, effort.budget, effort.most)
    return Result(name, what, tokens, found["moekern"], found["transformers"])


def _prompt(name: str, model: Any, tokens: int) -> Contender:
    return Contender(name, lambda turn: model(_ids(turn, tokens), use_cache=False))


def _next_token(name: str, model: Any) -> Contender:
    """The token after `CONTEXT` others."""
    cache = model(_ids(0, CONTEXT), use_cache=True).past_key_values

    @contextlib.contextmanager
    def cropped() -> Iterator[None]:
        yield
        if (more := cache.get_seq_length() - CONTEXT) > 0:
            cache.crop(-more)

    return Contender(name, lambda turn: model(_ids(turn, 1), past_key_values=cache, use_cache=True), cropped)
