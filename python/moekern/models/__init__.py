"""The sizes of a model's layers, from a config.json of transformers' or from those here, which have its fields."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekern.scaled import BLOCK


@dataclass(frozen=True)
class Linear:
    name: str
    n: int  # rows of the weight
    k: int  # columns of the weight


@dataclass(frozen=True)
class Experts:
    """A Mixture-of-Experts layer, and how its router chooses. shared: experts that every token goes to."""

    count: int
    top_k: int
    hidden: int
    intermediate: int
    shared: int = 0
    scoring: str = "softmax"
    renormalise: bool = True
    scaling: float = 1.0
    groups: int = 1
    kept_groups: int = 1
    correction_bias: bool = False


@dataclass(frozen=True)
class Model:
    name: str
    linears: tuple[Linear, ...]
    experts: Experts | None
    block: tuple[int, int]  # rows and columns of weights that have one scale


def names() -> list[str]:
    return sorted(path.stem for path in Path(__file__).parent.glob("*.json"))


def load(name: str) -> Model:
    """By its name here, or from a file or a folder with a config.json. Raises ValueError where there is none."""
    path = Path(__file__).parent / f"{name}.json" if name in names() else Path(name)
    if path.is_dir():
        path = path / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{name} is neither a model ({', '.join(names())}) nor a config.json") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    try:
        return read(name, config)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a model's config.json: {type(error).__name__}: {error}") from None


def read(name: str, config: dict[str, Any]) -> Model:
    config = config.get("text_config") or config  # of models that also see
    quantization = config.get("quantization_config") or {}
    rows, columns = quantization.get("weight_block_size") or (BLOCK, BLOCK)
    experts = _experts(config)
    linears = [*_attention(config), *_mlp(config, experts)]
    return Model(name, tuple(dict.fromkeys(linears)), experts, (int(rows), int(columns)))


def _experts(config: dict[str, Any]) -> Experts | None:
    count = _first(config, "n_routed_experts", "num_experts", "num_local_experts")
    if not count:
        return None
    deepseek = config.get("model_type") == "deepseek_v3"  # whose router transformers' config leaves out
    return Experts(
        count=count,
        top_k=config["num_experts_per_tok"],
        hidden=config["hidden_size"],
        intermediate=_first(config, "moe_intermediate_size", "intermediate_size") or 0,
        shared=config.get("n_shared_experts") or 0,
        scoring=config.get("scoring_func") or ("sigmoid" if deepseek else "softmax"),
        renormalise=bool(config.get("norm_topk_prob", True)),
        scaling=float(config.get("routed_scaling_factor") or 1.0),
        groups=config.get("n_group") or 1,
        kept_groups=config.get("topk_group") or 1,
        correction_bias=config.get("topk_method") == "noaux_tc" or deepseek,
    )


def _attention(config: dict[str, Any]) -> list[Linear]:
    """Each projection, and those that engines put together."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if latent := config.get("kv_lora_rank"):
        nope, rope, value = (config[f"{part}_head_dim"] for part in ("qk_nope", "qk_rope", "v"))
        found = [Linear("kv_a", latent + rope, hidden), Linear("kv_b", heads * (nope + value), latent)]
        if q := config.get("q_lora_rank"):
            found += [Linear("q_a", q, hidden), Linear("q_a + kv_a", q + latent + rope, hidden)]
        found.append(Linear("q_b" if q else "q", heads * (nope + rope), q or hidden))
        return [*found, Linear("o", hidden, heads * value)]
    size = config.get("head_dim") or hidden // heads
    q, kv = heads * size, (config.get("num_key_value_heads") or heads) * size
    return [
        Linear("q", q, hidden), Linear("k, v", kv, hidden), Linear("qkv", q + 2 * kv, hidden), Linear("o", hidden, q),
    ]  # fmt: skip


def _mlp(config: dict[str, Any], experts: Experts | None) -> list[Linear]:
    """Of layers without experts, and of experts that every token goes to, as layers of their own."""
    hidden = config["hidden_size"]
    sizes = {}
    if experts is None or config.get("first_k_dense_replace"):
        sizes["mlp"] = config["intermediate_size"]
    if experts is not None and experts.shared:
        sizes["shared"] = experts.shared * experts.intermediate
    elif size := config.get("shared_expert_intermediate_size"):
        sizes["shared"] = size
    return [
        linear
        for name, size in sizes.items()
        for linear in (
            Linear(f"{name} gate, up", size, hidden),
            Linear(f"{name} gate + up", 2 * size, hidden),
            Linear(f"{name} down", hidden, size),
        )
    ]


def _first(config: dict[str, Any], *names: str) -> int | None:
    return next((config[name] for name in names if config.get(name)), None)
