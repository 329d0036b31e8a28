"""ONNX export of models made of moekern's ops, for devices without native kernels. Needs `moekern[onnx]`."""

from moekern.onnx.export import export
from moekern.onnx.forms import FORMS
from moekern.onnx.load import load_weights
from moekern.onnx.report import ExportReport
from moekern.onnx.targets import TARGETS
from moekern.onnx.weights import MODES

__all__ = ["FORMS", "MODES", "TARGETS", "ExportReport", "export", "load_weights"]
