"""moekern.onnx.load_weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from moekern.onnx.export import STORED
from moekern.onnx.runtimes import INSTALL
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
    found = {}
    for name, (format, rows, columns, tensor, index) in stored.items():
        part = slice(None) if index is None else index
        data = numpy_helper.to_array(tensors[tensor])[part].copy().view("uint8")
        scale = numpy_helper.to_array(tensors[f"{tensor}_scale_inv"])[part].copy()
        found[name] = ScaledTensor(
            torch.from_numpy(data).view(DTYPES[format]), torch.from_numpy(scale), (rows, columns)
        )
    return found
