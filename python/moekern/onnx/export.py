"""moekern.onnx.export."""

from __future__ import annotations

import collections
import json
import logging
from pathlib import Path
from typing import Any

import torch

from moekern.onnx import runtimes
from moekern.onnx.forms import FORMS
from moekern.onnx.graph import BLOCKS_SINCE, OLDEST_WRITTEN, Graph
from moekern.onnx.lower import fold_constants, lower
from moekern.onnx.program import Program, traced
from moekern.onnx.report import ExportReport
from moekern.onnx.targets import TARGETS, Target, check
from moekern.onnx.translate import Translation
from moekern.onnx.verify import Difference, Probes, difference, peak_memory
from moekern.onnx.weights import EXACT, MODES, Stored
from moekern.op import NotSupported

OPSETS = range(17, 24)  # onnxscript writes no more than 23
ACTIVATIONS = ("float", "fp8")
STORED = "moekern.weights"  # a file's own: {name: [format, block rows, block columns, tensor, index or None]}
_SMALL = 4_000_000  # bytes of a file that onnx.reference runs too


def export(
    model: torch.nn.Module,
    example_inputs: tuple[torch.Tensor, ...],
    path: str | Path,
    *,
    target: str | None = None,
    mode: str | None = None,
    moe: str | None = None,
    activations: str = "float",
    opset: int | None = None,
    dynamic_shapes: Any = None,
    verify: bool = True,
) -> ExportReport:
    """Write a model that calls moekern's ops as ONNX of standard operators.

    model: its calls of moekern's ops are translated; everything else is torch.onnx's.
    example_inputs: tensors, by position.
    target: the runtime that the file is for, "ort-cpu", "ort-cuda", "ascend", "migraphx", "openvino" or "qnn": chooses
        mode, moe and opset where they are None, refuses what the runtime cannot take, and checks every operator and
        type of the result against its list. None: any runtime of the opset.
    mode: how the file holds FP8 weights: "fp8-qdq" (default) and "uint8-lut" keep them bit for bit; "int8-qdq",
        "fp16", "bf16" and "ort-contrib" round them. Products are float32, in "fp16" float16: export a model in float16.
    moe: "dense" (default) computes every expert for every token, with static shapes; "sparse" each for its own tokens;
        "loop" the same in a Loop over stacked weights; "contrib" is one com.microsoft operator.
    activations: "fp8" casts those of every product to FP8 first (W8A8), also where the model does not.
    opset: 17 to 23; default 21, or 17 for "fp16".
    dynamic_shapes: as torch.export takes it, for instance ({0: torch.export.Dim("tokens")},).
    verify: check the file, run it in onnxruntime, and in onnx's reference evaluator if it is small (and in OpenVINO if
        that is the target and installed), and compare its outputs with the model's, and every call of an op of
        moekern's with the op's float64 reference.

    Weights lie beside the file, in `path` with ".data" appended, written one after another. Raises ValueError for a
    wrong option or an onnxruntime that cannot load the file, NotSupported, naming the module, for what has no
    translation or the target does not take, RuntimeError where onnxruntime chose other experts, ImportError for a
    missing package.
    """
    for_target = None if target is None else TARGETS.get(target)
    if target is not None and for_target is None:
        raise ValueError(f"export: target is {target!r}; it must be one of {', '.join(TARGETS)}")
    mode = mode or (for_target.mode if for_target else "fp8-qdq")
    moe = moe or (for_target.moe if for_target else "contrib" if mode == "ort-contrib" else "dense")
    opset = opset or _default_opset(for_target, mode)
    _check_options(for_target, mode, moe, activations, opset, dynamic_shapes)
    try:
        import onnx
        import onnx_ir as ir
        import onnxscript  # noqa: F401
    except ImportError as missing:
        raise ImportError(f"moekern.onnx needs {missing.name}: {runtimes.INSTALL}") from None
    program = Program(traced(model, example_inputs, dynamic_shapes))
    stored = Stored(Graph(opset), mode)
    translation = Translation(program, stored.graph, stored, moe, activations == "fp8")
    table = translation.table()
    program.refuse_others(table)
    written = _translated(program, table, max(opset, OLDEST_WRITTEN))
    probes = _optimised(written.model, translation)
    if opset < OLDEST_WRITTEN:
        lower(written.model, opset)
    if for_target is not None:
        if for_target.folded:
            fold_constants(written.model)
        check(written.model, for_target)
    if mode in EXACT:
        written.model.metadata_props[STORED] = json.dumps(_names(stored))
    domains = [onnx.helper.make_opsetid(*pair) for pair in written.model.opset_imports.items() if not pair[0]]
    written.model.ir_version = onnx.helper.find_min_ir_version_for(domains)
    path = Path(path)
    ir.passes.common.NameFixPass()(written.model)
    written.save(path, external_data=True)
    data = path.with_name(f"{path.name}.data")
    size = path.stat().st_size + (data.stat().st_size if data.exists() else 0)
    nodes = collections.Counter(node.op_type for node in ir.traversal.RecursiveGraphIterator(written.model.graph))
    found: dict[str, Difference] = {}
    layers, peak = [], None
    if verify:
        standard = not any(written.model.opset_imports.keys() - {""})
        feeds = {slot.name: x for slot, x in zip(written.model.graph.inputs, example_inputs, strict=True)}
        found, peak = _verified(model, example_inputs, path, feeds, for_target, size <= _SMALL and standard)
        layers = probes.layers(path, feeds, program.modules(table), activations == "fp8")
    return ExportReport(
        path=path,
        target=target,
        why=for_target.why if for_target and (mode, moe) == (for_target.mode, for_target.moe) else "",
        mode=mode,
        moe=moe,
        activations=activations,
        opset=opset,
        ir=written.model.ir_version,
        nodes=dict(nodes),
        bytes=size,
        runtimes=found,
        layers=layers,
        peak_memory=peak,
    )


def _default_opset(target: Target | None, mode: str) -> int:
    own = 17 if mode == "fp16" else BLOCKS_SINCE
    if target is None:
        return own
    return target.opset if mode == target.mode else min(own, target.last_opset)


def _check_options(
    target: Target | None, mode: str, moe: str, activations: str, opset: int, dynamic_shapes: Any
) -> None:
    for name, value, allowed in (
        ("mode", mode, MODES),
        ("moe", moe, FORMS),
        ("activations", activations, ACTIVATIONS),
        ("opset", opset, OPSETS),
    ):
        if value not in allowed:
            raise ValueError(f"export: {name} is {value!r}; it must be one of {', '.join(map(str, allowed))}")
    if target is not None:
        target.refuse(mode, moe, opset, dynamic_shapes is not None)
    if opset < BLOCKS_SINCE and (mode in ("fp8-qdq", "int8-qdq") or activations == "fp8"):
        what = f"mode {mode}" if mode in ("fp8-qdq", "int8-qdq") else 'activations="fp8"'
        raise ValueError(f"export: opset is {opset}; {what} needs {BLOCKS_SINCE}, where DequantizeLinear got blocks")
    if moe == "loop" and mode in ("fp8-qdq", "ort-contrib"):
        reason = (
            "no operator takes a part of an FP8 tensor" if mode == "fp8-qdq" else "MatMulNBits' weights are constant"
        )
        raise ValueError(
            f'export: moe="loop" with mode {mode}: {reason}; mode="uint8-lut" keeps the FP8 bytes in a Loop'
        )
    if moe == "contrib" and mode not in ("ort-contrib", "fp16"):
        raise ValueError(f'export: moe="contrib" takes mode="ort-contrib" (QMoE) or "fp16" (MoE), not {mode!r}')


def _translated(program: Program, table: dict[Any, Any], opset: int) -> Any:
    torchs = logging.getLogger("torch.onnx")  # warns of packages that it does without
    level = torchs.level
    torchs.setLevel(logging.ERROR)
    try:
        written = torch.onnx.export(
            program.exported, (), dynamo=True, custom_translation_table=table, opset_version=opset, verbose=False,
            optimize=False,
        )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as failure:
        reason: BaseException | None = failure
        while reason is not None and not isinstance(reason, (NotSupported, ValueError)):
            reason = reason.__cause__
        raise reason or NotSupported(f"ONNX export: {program.untranslated(failure)}") from failure
    finally:
        torchs.setLevel(level)
    assert written is not None
    return written


def _optimised(model: Any, translation: Translation) -> Probes:
    """In place, with the weights as initialisers that it leaves alone."""
    import onnx_ir as ir
    import onnxscript

    weights = translation.graph.initialisers
    ir.passes.common.RemoveUnusedNodesPass()(model)  # with parameters that only were operands of moekern's ops
    for name in weights.keys() & model.graph.initializers.keys():
        model.graph.initializers[name].name = f"{name}.plain"
    for value in weights.values():
        model.graph.initializers.add(value)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        model.opset_imports.setdefault(node.domain, 1)
    probes = Probes(model, translation.calls)

    def should_fold(node: Any) -> bool | None:
        return False if any(value is not None and value.name in weights for value in node.inputs) else None

    onnxscript.optimizer.optimize_ir(model, should_fold=should_fold)
    probes.settle()
    ir.passes.common.IdentityEliminationPass()(model)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    return probes


def _names(stored: Stored) -> dict[str, list[Any]]:
    return {
        name: [matrix.format, *matrix.block, weight.name, index if weight.stacked else None]
        for weight in stored.weights.values()
        for index, (name, matrix) in enumerate(zip(weight.names, weight.matrices, strict=True))
    }


def _verified(
    model: torch.nn.Module,
    example_inputs: tuple[torch.Tensor, ...],
    path: Path,
    feeds: dict[str, torch.Tensor],
    target: Target | None,
    small: bool,
) -> tuple[dict[str, Difference], int | None]:
    import importlib.util

    import onnx

    onnx.checker.check_model(path, full_check=True)
    with torch.no_grad():
        expected = model(*example_inputs)
    expected = [expected] if isinstance(expected, torch.Tensor) else list(expected)
    results, peak = peak_memory(lambda: runtimes.onnxruntime(path, feeds))
    found = {"onnxruntime": difference(expected, results)}
    if small:
        found["onnx.reference"] = difference(expected, runtimes.reference(path, feeds))
    if target is not None and target.name == "openvino" and importlib.util.find_spec("openvino"):
        found["OpenVINO"] = difference(expected, runtimes.openvino(path, feeds))
    return found, peak
