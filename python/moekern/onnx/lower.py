"""What exporters leave in a graph and older runtimes do not take."""

from __future__ import annotations

from typing import Any

from moekern.onnx.graph import OLDEST_WRITTEN
from moekern.op import NotSupported

_SAME_REDUCTIONS = ("none", "add", "mul")  # of ScatterND and ScatterElements before opset 18


def lower(model: Any, opset: int) -> None:
    """Opset 18 to 17, in place: axes of reductions become attributes, Split loses its count.

    onnx's own converter has no adapter for Split and drops where external tensors are.
    """
    import onnx
    import onnx_ir as ir

    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain != "":
            continue
        name, before = node.op_type, onnx.defs.get_schema(node.op_type, OLDEST_WRITTEN)
        try:
            after = onnx.defs.get_schema(name, opset)
        except onnx.defs.SchemaError:
            raise NotSupported(f"ONNX export: {name} came after opset {opset}; opset={before.since_version}") from None
        node.version = None
        if before.since_version == after.since_version:
            continue
        if name.startswith("Reduce"):
            if len(node.inputs) > 1 and node.inputs[1] is not None:
                axes = ir.convenience.get_const_tensor(node.inputs[1])
                if axes is None:
                    raise NotSupported(f"ONNX export: {name} over axes that are not constant needs opset 18")
                node.attributes["axes"] = ir.AttrInt64s("axes", axes.numpy().tolist())
                node.resize_inputs(1)
            node.attributes.pop("noop_with_empty_axes", None)
        elif name == "Split":
            count = node.attributes.pop("num_outputs", None)
            if count is not None and any(output.shape != node.outputs[0].shape for output in node.outputs):
                raise NotSupported(f"ONNX export: Split into {count.value} parts that differ needs opset 18")
        elif not (
            (name == "Pad" and len(node.inputs) < 4)
            or (name.startswith("Scatter") and _reduction(node) in _SAME_REDUCTIONS)
        ):
            raise NotSupported(f"ONNX export: {name} has changed since opset {opset}; opset={before.since_version}")
    model.opset_imports[""] = opset


def _reduction(node: Any) -> str:
    return node.attributes["reduction"].value if "reduction" in node.attributes else "none"


def fold_constants(model: Any) -> None:
    """Nodes of initialisers alone become initialisers, computed when the file is written."""
    import onnx_ir as ir

    graph = model.graph
    for node in list(graph):
        output = node.outputs[0]
        known = [value is None or value.is_initializer() for value in node.inputs]
        if not node.inputs or not all(known) or len(node.outputs) > 1 or output.is_graph_output():
            continue
        if output.shape is None or not output.shape.is_static() or output.dtype is None:
            continue
        tensor = ir.LazyTensor(
            _later(node, model.opset_imports), dtype=output.dtype, shape=output.shape, name=output.name
        )
        value = ir.Value(name=output.name, shape=output.shape, type=output.type, const_value=tensor)
        output.name = f"{output.name}.computed"
        ir.convenience.replace_all_uses_with(output, value)
        graph.remove(node, safe=True)
        graph.initializers.add(value)


def _later(node: Any, opsets: dict[str, int]) -> Any:
    """A node's result from its inputs' values."""
    import onnx
    import onnx_ir as ir
    from onnx.reference import ReferenceEvaluator

    inputs = {value.name: value.const_value for value in node.inputs if value is not None}
    infos = [
        onnx.helper.make_tensor_value_info(name, int(tensor.dtype), list(tensor.shape))
        for name, tensor in inputs.items()
    ]
    result = onnx.helper.make_tensor_value_info(node.outputs[0].name, int(node.outputs[0].dtype), None)
    graph = onnx.helper.make_graph([ir.to_proto(node)], "constant", infos, [result])
    alone = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opsets[""])])

    def make() -> Any:
        (value,) = ReferenceEvaluator(alone).run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        return ir.tensor(value)

    return make
