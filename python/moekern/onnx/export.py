"""moekern.onnx.export."""

from __future__ import annotations

import collections
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moekern.onnx.translate import MOE, Translation
from moekern.onnx.weights import EXACT, MODES, Value
from moekern.op import NotSupported

OPSETS = range(21, 24)  # blocks in DequantizeLinear from 21 on; onnxscript writes no more than 23
INSTALL = "pip install 'moekern[onnx]'"
STORED = "moekern.weights"  # a file's own: {name: [format, block rows, block columns]}


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how its outputs differ from the model's on the example inputs."""

    path: Path
    mode: str
    moe: str
    opset: int
    nodes: dict[str, int]  # how many of each operator
    bytes: int  # of the file and its external data
    rms_error: float | None  # relative, over all outputs; None: not verified
    max_error: float | None  # relative to the largest magnitude

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.mode}, experts {self.moe}, opset {self.opset}, {self.bytes / 1e6:.2f} MB, "
            f"{sum(self.nodes.values())} nodes",
            "  " + ", ".join(f"{count} {name}" for name, count in sorted(self.nodes.items())),
        ]
        if self.rms_error is None:
            lines.append("  not verified")
        else:
            lines.append(f"  in onnxruntime: {self.rms_error:.1e} rms, {self.max_error:.1e} at most")
        return "\n".join(lines)


def export(
    model: torch.nn.Module,
    example_inputs: tuple[torch.Tensor, ...],
    path: str | Path,
    *,
    mode: str = "fp8-qdq",
    moe: str = "dense",
    opset: int = 21,
    dynamic_shapes: Any = None,
    verify: bool = True,
) -> ExportReport:
    """Write a model that calls moekern's ops as ONNX of standard operators.

    model: its calls of fp8_gemm_nt, per_token_cast_to_fp8, moe_gate and fused_experts are translated; everything else
        is torch.onnx's.
    example_inputs: tensors, by position.
    mode: how the file holds FP8 weights: "fp8-qdq" and "uint8-lut" keep them bit for bit, "int8-qdq", "fp16" and "bf16"
        round them. Products are float32.
    moe: "dense" computes every expert for every token, with static shapes; "sparse" each for its own tokens.
    opset: 21 to 23.
    dynamic_shapes: as torch.export takes it, for instance ({0: torch.export.Dim("tokens")},).
    verify: check the file, run it in onnxruntime and compare its outputs with the model's.

    Weights lie beside the file, in `path` with ".data" appended. Raises ValueError for a wrong option, NotSupported for
    an operator without translation, naming the module that calls it, ImportError for a missing package.
    """
    for name, value, allowed in (("mode", mode, MODES), ("moe", moe, MOE), ("opset", opset, OPSETS)):
        if value not in allowed:
            raise ValueError(f"export: {name} is {value!r}; it must be one of {', '.join(map(str, allowed))}")
    try:
        import onnx
        import onnx_ir
        import onnxscript
    except ImportError as missing:
        raise ImportError(f"moekern.onnx needs {missing.name}: {INSTALL}") from None
    with torch.no_grad():
        program = torch.export.export(model, example_inputs, dynamic_shapes=dynamic_shapes)
    translation = Translation(getattr(onnxscript, f"opset{opset}"), mode, moe, _Own(program))
    table = translation.table()
    _refuse_others(program, table)
    try:
        exported = torch.onnx.export(
            program, (), dynamo=True, custom_translation_table=table, opset_version=opset, verbose=False
        )
    except torch.onnx.errors.OnnxExporterError as failure:
        reason: BaseException | None = failure
        while reason is not None and not isinstance(reason, (NotSupported, ValueError)):
            reason = reason.__cause__
        raise reason or failure from None
    assert exported is not None
    onnx_ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=False)(exported.model)
    if mode in EXACT:
        stored = {name: [matrix.format, *matrix.block] for name, matrix in translation.stored.matrices.items()}
        exported.model.metadata_props[STORED] = json.dumps(stored)
    path = Path(path)
    exported.save(path, external_data=True)
    graph = onnx.load(path, load_external_data=False).graph
    data = path.with_name(f"{path.name}.data")
    rms, largest = _verify(model, example_inputs, path) if verify else (None, None)
    return ExportReport(
        path,
        mode,
        moe,
        opset,
        dict(collections.Counter(node.op_type for node in graph.node)),
        path.stat().st_size + (data.stat().st_size if data.exists() else 0),
        rms,
        largest,
    )


class _Own:
    """What a program computes from its parameters, buffers and constants alone, by the names of its graph's nodes."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        signature = program.graph_signature
        known = {**program.state_dict, **program.constants}
        self._targets = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        self._tensors = {name: known[target] for name, target in self._targets.items()}
        self._nodes = {node.name: node for node in program.graph.nodes}

    def __call__(self, value: Value) -> tuple[str, torch.Tensor]:
        node = self._nodes[value.name]
        tensor = self._tensor(node)
        return self._name(node, tensor), tensor

    def _tensor(self, node: torch.fx.Node) -> torch.Tensor:
        if node.name not in self._tensors:
            if node.op != "call_function":
                raise NotSupported(
                    f"ONNX export: FP8 weights depend on the input {node.name}; they must be the model's own"
                )
            arguments = torch.fx.node.map_arg((node.args, node.kwargs), self._tensor)
            self._tensors[node.name] = node.target(*arguments[0], **arguments[1])  # type: ignore[operator]
        return self._tensors[node.name]

    def _name(self, node: torch.fx.Node, tensor: torch.Tensor) -> str:
        """That of the model's own tensor; a part of one, or what is computed from it, has its node's behind it."""
        source = node
        while source.name not in self._targets:
            source = source.all_input_nodes[0]
        target = self._targets[source.name]
        return target if tensor.is_set_to(self._tensor(source)) else f"{target}.{node.name}"


def _refuse_others(program: torch.export.ExportedProgram, table: dict[Any, Any]) -> None:
    for node in program.graph.nodes:
        if (
            node.op == "call_function"
            and getattr(node.target, "namespace", "") == "moekern"
            and node.target not in table
        ):
            modules = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
            known = ", ".join(sorted(each.name().split("::")[1] for each in table))
            raise NotSupported(
                f"ONNX export: {modules[-1] if modules else 'the model'} calls {node.target.name()}, which has no "
                f"translation; these have: {known}"
            )


def _verify(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], path: Path) -> tuple[float, float]:
    import onnx

    try:
        import onnxruntime
    except ImportError:
        raise ImportError(f"export: verify=True needs onnxruntime: {INSTALL}; verify=False goes without") from None
    onnx.checker.check_model(path, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = {slot.name: x.numpy() for slot, x in zip(session.get_inputs(), inputs, strict=True)}
    with torch.no_grad():
        expected = model(*inputs)
    expected = [expected] if isinstance(expected, torch.Tensor) else list(expected)
    square = error = largest = worst = 0.0
    for ours, theirs in zip(expected, session.run(None, feeds), strict=True):
        exact, got = ours.double(), torch.from_numpy(theirs).double()
        square += exact.square().sum().item()
        error += (exact - got).square().sum().item()
        largest = max(largest, exact.abs().max().item())
        worst = max(worst, (exact - got).abs().max().item())
    return (error / square) ** 0.5, worst / largest
