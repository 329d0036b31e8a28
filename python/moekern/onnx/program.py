"""An exported program: what it computes from its own tensors alone, and which module each of its parts is of."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from moekern.onnx.graph import Value
from moekern.op import NotSupported


def traced(
    model: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...], dynamic_shapes: Any
) -> torch.export.ExportedProgram:
    """By torch.export. Raises NotSupported, naming the module, where a shape depends on values."""
    try:
        with torch.no_grad(), warnings.catch_warnings(), _entered(model) as modules:
            warnings.simplefilter("ignore", FutureWarning)
            return torch.export.export(model, example_inputs, dynamic_shapes=dynamic_shapes)
    except torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode as failure:
        raise NotSupported(
            f"ONNX export: {modules[-1] if modules else 'the model'} has a shape that depends on values: "
            f"{str(failure).strip().splitlines()[0]}. Where it chooses rows by what is in a tensor (nonzero, masks as "
            "indices, .item()), compute all of them and use torch.where; moekern.fused_experts sends tokens to experts "
            "without that"
        ) from None


@contextmanager
def _entered(model: torch.nn.Module) -> Iterator[list[str]]:
    """The paths of the modules that are being called; after an error, of those that it came through."""
    names = {id(module): name for name, module in model.named_modules()}
    entered: list[str] = []

    def enter(module: torch.nn.Module, *_: Any) -> None:
        entered.append(names.get(id(module)) or "the model")

    def leave(*_: Any) -> None:
        entered.pop()

    hooks = torch.nn.modules.module
    handles = hooks.register_module_forward_pre_hook(enter), hooks.register_module_forward_hook(leave)
    try:
        yield entered
    finally:
        for handle in handles:
            handle.remove()


class Program:
    """Of torch.export; values of a graph that is made of it have the names of its nodes."""

    def __init__(self, exported: torch.export.ExportedProgram) -> None:
        self.exported = exported
        signature = exported.graph_signature
        known = {**exported.state_dict, **exported.constants}
        self._targets = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        self._tensors = {name: known[target] for name, target in self._targets.items()}
        self._nodes = {node.name: node for node in exported.graph.nodes}
        self._from_inputs: dict[torch.fx.Node, str] = {}  # one that each depends on
        for node in exported.graph.nodes:
            if node.op == "placeholder" and node.name not in self._targets:
                self._from_inputs[node] = node.name
            elif sources := [self._from_inputs[s] for s in node.all_input_nodes if s in self._from_inputs]:
                self._from_inputs[node] = sources[0]

    def own(self, value: Value) -> tuple[str, torch.Tensor]:
        """Name and tensor of a value that depends on no input."""
        node = self._nodes[value.name]
        if node in self._from_inputs:
            raise NotSupported(
                f"ONNX export: FP8 weights depend on the input {self._from_inputs[node]}; they must be the model's own"
            )
        tensor = self._tensor(node)
        return self._name(node, tensor), tensor

    def tensor(self, value: Value) -> torch.Tensor | None:
        """What `own` has of a value, or None."""
        node = self._nodes.get(value.name)
        return None if node is None or node in self._from_inputs else self._tensor(node)

    def _tensor(self, node: torch.fx.Node) -> torch.Tensor:
        if node.name not in self._tensors:
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

    def modules(self, operators: Iterable[Any]) -> list[str]:
        """The module of every call of these, in order."""
        return [module_of(node) for node in self.exported.graph.nodes if node.target in operators]

    def untranslated(self, failure: BaseException) -> str:
        """What torch.onnx.export says, with the module of the node that it names."""
        node, reason, cause = None, str(failure), failure.__cause__
        while cause is not None:
            if found := re.search(r"translating node %(\S+)", str(cause)):
                node = found[1]
            reason, cause = str(cause), cause.__cause__
        nodes = {each.name: each for each in self.exported.run_decompositions().graph.nodes}  # as the exporter has it
        where = module_of(nodes[node]) if node in nodes else "the model"
        return f"{where}: {reason}"

    def refuse_others(self, table: dict[Any, Any]) -> None:
        """Raise NotSupported for an operator of moekern's that is not in `table`."""
        for node in self.exported.graph.nodes:
            if getattr(node.target, "namespace", "") == "moekern" and node.target not in table:
                known = ", ".join(sorted(each.name().split("::")[1] for each in table))
                raise NotSupported(
                    f"ONNX export: {module_of(node)} calls {node.target.name()}, which has no translation; these have: "
                    f"{known}"
                )


def module_of(node: torch.fx.Node) -> str:
    """The innermost module that a node is of, by its path in the model."""
    paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return paths[-1] if paths and paths[-1] else "the model"
