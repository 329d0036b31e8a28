"""Slices of real models inside transformers: `python bench/run.py --op model`.

The same weights twice, in FP8 by moekern.integrations.transformers and in bf16 as transformers itself runs them where
there is no GPU. Only layers: neither embeddings of the real size nor an output head, which both routes share.
"""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import packages
import psutil
import torch
from compete import WRONG, Effort
from measure import Contender, Samples, interleave
from report import bare_table, duration, show, spread
from rich.console import Console

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
PREFILL, QUICK_PREFILL = (64, 512), (64,)
LARGEST_DIFFERENCE = 0.3  # rms, relative: FP8's own error in every layer, and routing that flips for it
MEMORY = 0.8  # of what is free, for both models


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
        needed = 3 * _weights(config)  # bytes: two a weight in bf16, one in FP8
        if needed > MEMORY * psutil.virtual_memory().available:
            notes.append(f"{name}: no memory for {depth} layers in bf16 and in FP8, {needed / 1e9:.0f} GB")
            continue
        with _models(config) as (ours, theirs):
            size = _bytes(ours) / _bytes(theirs)
            console.print(f"\n[bold]{name} · {depth} layers · {_bytes(ours) / 1e9:.2f} GB, {size:.2f} of bf16's")
            models = ("moekern", ours), ("transformers", theirs)
            difference = _difference(ours, theirs)
            if not difference < LARGEST_DIFFERENCE:
                notes.append(f"{WRONG}, not timed: model {name}: hidden states are {difference:.2f} off, relative rms")
                continue
            found = [_compare(name, "next token", 1, [_next_token(*model) for model in models], effort)]
            for tokens in prefill:
                prompts = [_prompt(*model, tokens) for model in models]
                found.append(_compare(name, f"prompt of {tokens}", tokens, prompts, effort))
        table = bare_table()
        for heading in ("", "moekern", "", "tokens/s", "transformers", "", "tokens/s", "ratio"):
            table.add_column(heading, justify="right")
        for r in found:
            columns = ((duration(s.median), spread(s), f"{r.tokens / s.median:.0f}") for s in (r.ours, r.theirs))
            table.add_row(r.what, *(text for column in columns for text in column), f"{r.ratio:.2f}x")
        show(console, table)
        results += found
    return results, notes


def _config(name: str, depth: int) -> Any:
    import transformers

    kind, sizes = CONFIGS[name]
    return getattr(transformers, kind)(vocab_size=VOCABULARY, num_hidden_layers=depth, **sizes)


def _weights(config: Any) -> int:
    from transformers import AutoModel

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModel.from_config(config).parameters())


@contextlib.contextmanager
def _models(config: Any) -> Iterator[tuple[Any, Any]]:
    from transformers import AutoModel, FineGrainedFP8Config
    from transformers.utils import logging

    import moekern.integrations.transformers as integration

    logging.disable_progress_bar()
    theirs = AutoModel.from_config(config, dtype=torch.bfloat16).eval()
    with tempfile.TemporaryDirectory() as folder, integration.install():
        theirs.save_pretrained(folder)
        settings = FineGrainedFP8Config(weight_block_size=(128, 128))
        options = {"dtype": torch.bfloat16, "quantization_config": settings, "experts_implementation": "moekern"}
        yield AutoModel.from_pretrained(folder, **options).eval(), theirs
    gc.collect()


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
