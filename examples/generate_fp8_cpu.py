"""Generates text from a local checkpoint on the CPU, its weights in FP8.

    pip install 'moekern[transformers]'
    python examples/generate_fp8_cpu.py FOLDER --prompt "The capital of France is"

FOLDER holds a transformers checkpoint: FP8 as DeepSeek publishes it, or bf16 and then quantised while it loads. Prints
the text, tokens per second, memory, and which of moekern's kernels ran.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import FP8Linear

import moekern
import moekern.integrations.transformers as moekern_transformers


def kernels(model: Any, rows: int) -> str:
    """Which of moekern's kernels a linear layer takes for so many rows."""
    layer = next(m for m in model.modules() if isinstance(m, FP8Linear))
    x = torch.zeros(rows, layer.in_features, dtype=torch.bfloat16)
    weight = moekern.ScaledTensor(layer.weight, layer.weight_scale_inv, tuple(layer.block_size))
    return moekern.explain(moekern.fp8_gemm_nt, x, weight).splitlines()[0]


def load(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder)
    quantized = getattr(config, "quantization_config", None) is not None
    options: dict[str, Any] = {} if quantized else {"quantization_config": FineGrainedFP8Config()}
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        options["experts_implementation"] = "moekern"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()


def encode(folder: Path, prompt: str) -> tuple[torch.Tensor, Any]:
    if not list(folder.glob("*token*")):  # bytes will do to see that the model runs
        return torch.tensor([list(prompt.encode())]), None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer(prompt, return_tensors="pt").input_ids, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--w8a8", action="store_true", help="cast activations to FP8 too, as GPUs do")
    arguments = parser.parse_args()

    moekern_transformers.install(quantize_activations=arguments.w8a8)
    model = load(arguments.folder)
    ids, tokenizer = encode(arguments.folder, arguments.prompt)
    fp8 = sum(p.numel() for p in model.parameters() if p.dtype == torch.float8_e4m3fn)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"{fp8 / 1e6:.1f} M of {model.num_parameters() / 1e6:.1f} M weights in FP8, {size / 1e6:.1f} MB in all")

    with torch.inference_mode():
        started = time.perf_counter()
        model.generate(ids, max_new_tokens=1, do_sample=False)
        first = time.perf_counter() - started
        started = time.perf_counter()
        found = model.generate(ids, max_new_tokens=arguments.tokens, min_new_tokens=arguments.tokens, do_sample=False)
        rest = time.perf_counter() - started - first
    print(tokenizer.decode(found[0]) if tokenizer else found[0].tolist())
    print(f"prompt: {ids.shape[1] / first:.1f} tokens/s, then {max(arguments.tokens - 1, 1) / rest:.1f} tokens/s")
    print(f"largest resident size: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")
    for rows in (ids.shape[1], 1):
        print(f"{rows} rows: {kernels(model, rows)}")


if __name__ == "__main__":
    main()
