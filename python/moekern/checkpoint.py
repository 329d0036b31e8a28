"""Mixture-of-Experts layers of a safetensors checkpoint, used where its files are mapped."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moekern.experts import ExpertWeights
from moekern.scaled import FORMATS

INDEX = "model.safetensors.index.json"
_EXPERT = re.compile(r"(?P<block>.*\blayers\.(?P<layer>\d+)\.(?:mlp|block_sparse_moe))\.experts\.(?P<expert>\d+)\.")
_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))  # DeepSeek, Qwen; Mixtral
_SCALES = ("weight_scale_inv", "weight_scale")  # DeepSeek; compressed-tensors. Both multiply


class MoeLayer(NamedTuple):
    """What a checkpoint has of a layer."""

    experts: ExpertWeights
    shared: ExpertWeights | None  # shared experts, as one
    gate: torch.Tensor  # the router's weight, [E, H]
    correction_bias: torch.Tensor | None  # [E], added to the router's scores for choosing


class Checkpoint:
    """The tensors of a safetensors file, or of a folder with an index or some of them.

    Tensors are views of the mapped files: memory is the page cache's, and what no call touches is never read.
    A file must stay as it is while they live. Needs the package safetensors.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            from safetensors import safe_open
        except ImportError:
            raise ImportError("moekern.checkpoint needs the package safetensors: pip install safetensors") from None
        path = Path(path)
        self._open = safe_open
        self._files: dict[Path, Any] = {}
        if path.is_file():
            self._file_of = dict.fromkeys(self._keys(path), path)
        elif (path / INDEX).is_file():
            names = json.loads((path / INDEX).read_text())["weight_map"]
            self._file_of = {name: path / file for name, file in names.items()}
        else:
            self._file_of = {name: file for file in sorted(path.glob("*.safetensors")) for name in self._keys(file)}
        if not self._file_of:
            raise FileNotFoundError(f"{path} has no {INDEX} and no .safetensors file")
        self.path = path

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._file_of)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, as a view of its mapped file."""
        if name not in self._file_of:
            raise KeyError(f"{self.path} has no tensor {name}")
        return self._file(self._file_of[name]).get_tensor(name)

    def moe_layers(self) -> list[int]:
        """The layers that have experts, of which each is in matrices of its own."""
        return sorted({int(found["layer"]) for name in self._file_of if (found := _EXPERT.match(name))})

    def moe_layer(self, index: int) -> MoeLayer:
        """The experts and the router of a layer.

        Names are DeepSeek's, `model.layers.L.mlp.experts.E.gate_proj.weight` (up_proj, down_proj), or Mixtral's,
        `...block_sparse_moe.experts.E.w1.weight` (w3, w2); scales are beside them as `weight_scale_inv` or, of
        compressed-tensors, `weight_scale`, one for the matrix, for each row or for each 128x128 block. The router
        is `gate.weight` with `gate.e_score_correction_bias`; `shared_experts` are one expert.
        """
        experts: dict[int, str] = {}
        block = ""
        for name in self._file_of:
            if (found := _EXPERT.match(name)) and int(found["layer"]) == index:
                experts[int(found["expert"])], block = found[0], found["block"]
        if not experts or sorted(experts) != list(range(len(experts))):
            has = f"experts {sorted(experts)}" if experts else f"experts in the layers {self.moe_layers()}"
            raise ValueError(f"{self.path}: layer is {index}, but the checkpoint has {has}")
        bias = f"{block}.gate.e_score_correction_bias"
        shared = f"{block}.shared_experts."
        return MoeLayer(
            self._experts([experts[e] for e in range(len(experts))]),
            self._experts([shared]) if any(name.startswith(shared) for name in self._file_of) else None,
            self.tensor(f"{block}.gate.weight"),
            self.tensor(bias) if bias in self._file_of else None,
        )

    def _experts(self, prefixes: list[str]) -> ExpertWeights:
        names = next((p for p in _PROJECTIONS if f"{prefixes[0]}{p[0]}.weight" in self._file_of), _PROJECTIONS[0])
        gate, up, down = ([self._matrix(prefix + name) for prefix in prefixes] for name in names)
        return ExpertWeights.separate(gate, up, down)

    def _matrix(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        weight = self.tensor(f"{name}.weight")
        scale = next((s for s in _SCALES if f"{name}.{s}" in self._file_of), None)
        if scale is None or weight.dtype not in FORMATS:
            raise TypeError(
                f"{self.path}: {name}.weight has dtype {weight.dtype} and {'no' if scale is None else 'a'} scale; "
                f"experts are {', '.join(map(str, FORMATS))} with {' or '.join(_SCALES)}"
            )
        values = self.tensor(f"{name}.{scale}")
        return weight, values.to(torch.float32) if values.is_floating_point() and values.itemsize > 1 else values

    def _file(self, path: Path) -> Any:
        if path not in self._files:
            self._files[path] = self._open(path, framework="pt")
        return self._files[path]

    def _keys(self, path: Path) -> list[str]:
        return list(self._file(path).keys())
