"""Runtimes that run a file here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from moekern.onnx.graph import BF16
from moekern.scaled import as_tensor

INSTALL = "pip install 'moekern[onnx]'"


def onnxruntime(path: Path, feeds: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Of the CPU; raises ValueError where the installed version cannot load the file, with what helps."""
    try:
        import onnxruntime
    except ImportError:
        raise ImportError(f"export: verify=True needs onnxruntime: {INSTALL}; verify=False goes without") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as failure:
        raise ValueError(f"onnxruntime {onnxruntime.__version__} cannot load {path}: {_advice(str(failure))}") from None
    values = {name: _to_onnxruntime(x) for name, x in feeds.items()}
    return [_from_onnxruntime(y) for y in session.run_with_ort_values(None, values)]


def _to_onnxruntime(x: torch.Tensor) -> Any:
    """numpy has no bfloat16."""
    from onnxruntime import OrtValue

    if x.dtype == torch.bfloat16:
        return OrtValue.ortvalue_from_numpy_with_onnx_type(x.view(torch.uint16).numpy(), BF16)
    return OrtValue.ortvalue_from_numpy(x.numpy())


def _from_onnxruntime(x: Any) -> torch.Tensor:
    if x.data_type() == "tensor(bfloat16)":
        return from_dlpack(x._ortvalue.to_dlpack()).clone()
    return torch.from_numpy(x.numpy())


def _advice(failure: str) -> str:
    failure = failure.strip().splitlines()[0]
    if "opset" in failure.lower() or "ir version" in failure.lower():
        return f"{failure}. A lower opset= may do, or pip install -U onnxruntime"
    if "NOT_IMPLEMENTED" in failure:
        return f"{failure}. It has few bfloat16 operators: export model.float(), or verify=False for other devices"
    return failure


def reference(path: Path, feeds: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """onnx's own evaluator in Python: slow, and independent of any runtime."""
    from onnx.reference import ReferenceEvaluator

    return [_tensor(y) for y in ReferenceEvaluator(str(path)).run(None, _arrays(feeds))]


def openvino(path: Path, feeds: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """On the CPU in float32: it would round to bfloat16 and quantise activations where it can."""
    import openvino

    core = openvino.Core()
    core.set_property("CPU", {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"})
    compiled = core.compile_model(path, "CPU")
    return [_tensor(y) for y in compiled(_arrays(feeds)).values()]


def _arrays(feeds: dict[str, torch.Tensor]) -> dict[str, Any]:
    """As numpy's; a bfloat16 is one of ml_dtypes."""
    return {name: _array(x) for name, x in feeds.items()}


def _array(x: torch.Tensor) -> Any:
    if x.dtype != torch.bfloat16:
        return x.numpy()
    import ml_dtypes

    return x.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)


def _tensor(x: Any) -> torch.Tensor:
    return as_tensor(x.copy())
