"""moekern.onnx.load_weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from moekern.onnx.export import INSTALL, STORED
from moekern.scaled import DTYPES, ScaledTensor


def load_weights(path: str | Path) -> dict[str, ScaledTensor]:
    """The FP8 weights of a file that `export` wrote as "fp8-qdq" or "uint8-lut", bit for bit, by their names in it.

    A name is that of the model's parameter; an expert of a stack has its number behind it, and where gate and up are
    one matrix their names: "mlp.experts.gate_up_proj.3.up".

    Raises ValueError for a file without them.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as missing:
        raise ImportError(f"moekern.onnx needs {missing.name}: {INSTALL}") from None
    model = onnx.load(path)
    stored = next((json.loads(prop.value) for prop in model.metadata_props if prop.key == STORED), None)
    if stored is None:
        raise ValueError(
            f"load_weights: {path} keeps no FP8 weights: moekern.onnx did not write it, or in another mode"
        )
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}

    def read(name: str) -> torch.Tensor:
        return torch.from_numpy(numpy_helper.to_array(tensors[name]).copy())

    found = {}
    for name, (format, *block) in stored.items():
        data = torch.from_numpy(numpy_helper.to_array(tensors[name]).copy().view("uint8")).view(DTYPES[format])
        found[name] = ScaledTensor(data, read(f"{name}_scale_inv"), tuple(block))
    return found
