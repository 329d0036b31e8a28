"""ONNX export of models made of moekern's ops, for devices without native kernels. Needs `moekern[onnx]`."""

from moekern.onnx.export import ExportReport, export
from moekern.onnx.load import load_weights
from moekern.onnx.weights import MODES

__all__ = ["MODES", "ExportReport", "export", "load_weights"]
