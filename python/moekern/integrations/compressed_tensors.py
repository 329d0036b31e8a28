"""compressed-tensors' block FP8 in the terms of DeepSeek's: the same weights and scales under other names."""

from __future__ import annotations

from typing import Any

SCALE, OURS = ".weight_scale", ".weight_scale_inv"  # after the name of a layer; both are multipliers


def block_fp8(settings: dict[str, Any]) -> dict[str, Any] | None:
    """`weight_block_size` and `modules_to_not_convert` of a checkpoint's quantization_config.

    None where it is something else than FP8 weights in blocks, for all linear layers alike.
    """
    groups = list((settings.get("config_groups") or {}).values())
    if len(groups) != 1 or groups[0].get("targets") != ["Linear"]:
        return None
    weights = groups[0].get("weights") or {}
    kind = weights.get("num_bits"), weights.get("type"), weights.get("strategy"), weights.get("dynamic", False)
    if kind != (8, "float", "block", False) or not weights.get("symmetric", True):
        return None
    rows, columns = weights["block_structure"]
    return {
        "weight_block_size": (rows, columns),
        "modules_to_not_convert": [name.removeprefix("re:") for name in settings.get("ignore") or []],
    }
