"""Runtimes that a file may be for: what is written for each, why, and what it cannot take."""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from moekern.op import NotSupported

_NO_FP8 = "its ONNX parser has no FP8 type"
_NO_BLOCKS = "its DequantizeLinear has no blocks"
_NONZERO = "its shapes must be known beforehand, and those of NonZero depend on the routing"
_ORT_ONLY = "com.microsoft's operators are onnxruntime's"


@dataclass(frozen=True)
class Target:
    """mode, moe, opset: of a file for it where nobody says otherwise."""

    name: str
    mode: str
    moe: str
    opset: int
    why: str
    refused: dict[str, str] = field(default_factory=dict)  # mode or form -> reason
    static: bool = False  # no dimension may be dynamic
    folded: bool = False  # no node of constants alone

    def refuse(self, mode: str, moe: str, opset: int, dynamic: bool) -> None:
        """Raise NotSupported where the target cannot take what is asked for."""
        for what, value in (("mode", mode), ("moe", moe)):
            if value in self.refused:
                own = self.mode if what == "mode" else self.moe
                raise NotSupported(
                    f'export: {self.name} takes no {what}="{value}": {self.refused[value]}; "{own}" it takes'
                )
        if opset > self.last_opset:
            raise NotSupported(f"export: opset is {opset}; {self.name} takes none above {self.last_opset}")
        if dynamic and self.static:
            raise NotSupported(f"export: {self.name} takes static shapes only; leave out dynamic_shapes")

    @property
    def last_opset(self) -> int:
        """That its runtime is known to take."""
        return (self.operators().get("opsets") or (1, 23))[1]

    def operators(self) -> dict[str, Any]:
        """What its runtime is known to take: operators/<name>.json."""
        return _operators(self.name)


@functools.cache
def _operators(name: str) -> dict[str, Any]:
    file = resources.files("moekern.onnx") / "operators" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8"))


TARGETS = {
    target.name: target
    for target in (
        Target(
            "ort-cpu",
            "fp8-qdq",
            "sparse",
            21,
            "the FP8 bytes as they are, dequantised layer by layer, and every expert for its own tokens alone",
        ),
        Target(
            "ort-cuda",
            "fp16",
            "sparse",
            18,
            "weights in float16 for tensor cores, and every expert for its own tokens alone",
            {
                "fp8-qdq": "its DequantizeLinear takes blocks of 4-bit integers alone; uint8-lut keeps the FP8 bytes",
                "int8-qdq": "its DequantizeLinear takes blocks of 4-bit integers alone",
            },
        ),
        Target(
            "ascend",
            "fp16",
            "dense",
            17,
            "opset 17 and IR 8 of CANN's parser; float16 weights that need no operator, all experts in one product, "
            "no shape that depends on the routing",
            {
                "fp8-qdq": _NO_FP8,
                "uint8-lut": "nodes of constants alone leave its graph, and these decode weights",
                "int8-qdq": "it has no DequantizeLinear",
                "bf16": "its ONNX parser has no bfloat16",
                "ort-contrib": _ORT_ONLY,
                "sparse": _NONZERO,
                "loop": "it has no Loop",
                "contrib": _ORT_ONLY,
            },
            folded=True,
        ),
        Target(
            "migraphx",
            "fp16",
            "dense",
            17,
            "float16, whose products it compiles best, all experts in one product, and static shapes",
            {
                "fp8-qdq": "its ONNX parser has no float8e4m3fn",
                "int8-qdq": "it takes opset 19 at most, and blocks in DequantizeLinear came with 21",
                "bf16": "its operators list no bfloat16",
                "ort-contrib": _ORT_ONLY,
                "sparse": _NONZERO,
                "loop": _NONZERO,
                "contrib": _ORT_ONLY,
            },
            static=True,
            folded=True,
        ),
        Target(
            "openvino",
            "fp8-qdq",
            "sparse",
            21,
            "the FP8 bytes as they are, dequantised layer by layer, and every expert for its own tokens alone",
            {"ort-contrib": _ORT_ONLY, "contrib": _ORT_ONLY},
        ),
        Target(
            "qnn",
            "fp16",
            "dense",
            17,
            "float16, which its HTP computes in, all experts in one product, and static shapes",
            {
                "fp8-qdq": "it has no FP8 type",
                "int8-qdq": _NO_BLOCKS,
                "bf16": "it has no bfloat16",
                "ort-contrib": _ORT_ONLY,
                "sparse": "it has no NonZero",
                "loop": "it has no Loop",
                "contrib": _ORT_ONLY,
            },
            static=True,
            folded=True,
        ),
    )
}


def check(model: Any, target: Target) -> None:
    """Raise NotSupported, naming modules, for operators and types that the target's list does not have."""
    wrong: dict[str, list[str]] = {}
    for problem, module in _problems(model, target):
        wrong.setdefault(problem, []).append(module)
    if wrong:
        lines = [f"  {problem}: {', '.join(sorted(set(modules))[:4])}" for problem, modules in sorted(wrong.items())]
        runtime = target.operators()["runtime"]
        if any(not value.shape.is_static() for value in model.graph.inputs if value.shape is not None):
            lines.append("  With static shapes, without dynamic_shapes, some of these may not be needed.")
        raise NotSupported(f"export: {runtime} is not known to take this model:\n" + "\n".join(lines))


def _problems(model: Any, target: Target) -> Iterator[tuple[str, str]]:
    import onnx
    import onnx_ir as ir

    known = target.operators()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        key = f"{node.domain}:{node.op_type}" if node.domain else node.op_type
        module = _module(node)
        if target.static and any(not value.shape.is_static() for value in node.outputs if value.shape is not None):
            yield f"{key} of a shape that is not known beforehand", module
        if target.folded and node.inputs and all(v is None or v.is_initializer() for v in node.inputs):
            yield f"{key} of constants alone", module
        kinds = {_spelt(value.dtype) for value in node.inputs if value is not None and value.dtype is not None}
        for kind in sorted(kinds - set(known.get("types", kinds))):
            yield f"values of type {kind}", module
        schema = None if node.domain else onnx.defs.get_schema(node.op_type, model.opset_imports[""])
        if key not in known["operators"]:
            if not (known.get("functions") and _has_body(schema)):
                yield key, module
        elif schema is not None:
            yield from ((problem, module) for problem in _mismatch(node, key, schema, known))


def _has_body(schema: Any) -> bool:
    """Whether a runtime can write an operator that it does not have as others."""
    return schema is not None and (schema.has_function or schema.has_context_dependent_function)


def _mismatch(node: Any, key: str, schema: Any, known: dict[str, Any]) -> list[str]:
    """What is wrong of a node by every alternative of its operator; nothing if one fits."""
    found = []
    for entry in known["operators"][key]:
        first, last = entry.get("opsets", (1, None))
        if schema.since_version < first or (last is not None and schema.since_version > last):
            problem = f"{key} of opset {schema.since_version}"
        else:
            problem = _wrong_types(node, key, schema, entry, known.get("promotes", {}))
        if not problem:
            return []
        found.append(problem)
    return found[-1:]


def _wrong_types(node: Any, key: str, schema: Any, entry: dict[str, Any], promotes: dict[str, str]) -> str:
    for values, formal in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        for i, value in enumerate(values):
            allowed = entry.get(formal[min(i, len(formal) - 1)].type_str)
            if allowed is None or value is None or value.dtype is None:
                continue
            kind = _spelt(value.dtype)
            if kind not in allowed and promotes.get(kind) not in allowed:
                return f"{key} of {kind}"
    return ""


def _spelt(dtype: Any) -> str:
    return dtype.name.lower()


def _module(node: Any) -> str:
    """The module that a node was made for, as torch.onnx notes it."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    path = [scope for scope in scopes[:-1] if scope]
    return path[-1] if path else "the model"
