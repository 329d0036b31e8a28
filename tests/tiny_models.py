"""Tiny transformers models from their configs, as FP8 checkpoints in DeepSeek's naming; no hub is needed.

Sizes are no multiples of 128, so that scale grids are ragged; in two of the models gate ends within a block.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

import moekern
from moekern import ScaledTensor

_SIZES = {
    "vocab_size": 512,
    "hidden_size": 200,
    "intermediate_size": 328,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
_EXPERTS = {"num_experts_per_tok": 3}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            **_EXPERTS,
            "moe_intermediate_size": 256,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 96,
            "kv_lora_rank": 64,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
        },
    ),
    "qwen3-moe": ("Qwen3MoeConfig", {**_EXPERTS, "moe_intermediate_size": 192, "num_experts": 8, "head_dim": 48}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen3": ("Qwen3Config", {"head_dim": 48}),
}
NAMES = list(_CONFIGS)
OF_EXPERTS = NAMES[:3]
PROJECTION = re.compile(r"(proj|proj_with_mqa|\.w[123])\.weight$")


def config(name: str) -> Any:
    kind, more = _CONFIGS[name]
    return getattr(transformers, kind)(**_SIZES, **more)


def plain(name: str) -> Any:
    """The model in bf16, with random weights."""
    torch.manual_seed(sum(map(ord, name)))
    return transformers.AutoModelForCausalLM.from_config(config(name), dtype=torch.bfloat16)


def dequantized(name: str, folder: Path) -> Any:
    """The model in bf16 whose weights are those of an FP8 checkpoint, rounded."""
    tensors = load_file(folder / "model.safetensors")
    scales = {key: tensors.pop(f"{key}_scale_inv") for key in list(tensors) if f"{key}_scale_inv" in tensors}
    for key, scale in scales.items():
        tensors[key] = moekern.dequantize(ScaledTensor(tensors[key], scale, (128, 128)), out_dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as plain_folder:
        plain(name).save_pretrained(plain_folder)
        save_file(tensors, Path(plain_folder) / "model.safetensors", metadata={"format": "pt"})
        return transformers.AutoModelForCausalLM.from_pretrained(plain_folder, dtype=torch.bfloat16).eval()


_DEEPSEEK = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
_COMPRESSED_TENSORS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*mlp.gate$"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "float",
                "symmetric": True,
                "strategy": "block",
                "block_structure": [128, 128],
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "symmetric": True,
                "strategy": "group",
                "group_size": 128,
                "dynamic": True,
            },
        }
    },
}


def write(name: str, folder: Path, compressed_tensors: bool = False) -> Path:
    """The same model as an FP8 checkpoint; every projection has weight_scale_inv for its 128x128 blocks.

    compressed_tensors: with its settings and its name for scales, weight_scale.
    """
    scale_name = "_scale" if compressed_tensors else "_scale_inv"
    plain(name).save_pretrained(folder)
    tensors: dict[str, torch.Tensor] = {}
    for key, value in load_file(folder / "model.safetensors").items():
        if not PROJECTION.search(key):
            tensors[key] = value
            continue
        tensors[key], scale = moekern.per_block_cast_to_fp8(value)
        tensors[f"{key}{scale_name}"] = scale * (1 + torch.rand(scale.shape))  # no two blocks alike
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    settings["quantization_config"] = _COMPRESSED_TENSORS if compressed_tensors else _DEEPSEEK
    path.write_text(json.dumps(settings))
    return folder
