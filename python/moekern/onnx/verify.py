"""How far a file's results are from the model's and, call by call, from the float64 references."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moekern.onnx import runtimes
from moekern.onnx.graph import BF16, FLOAT, FP8, Value
from moekern.onnx.references import compared
from moekern.onnx.translate import Call, replaced, values_in
from moekern.scaled import DTYPES


class Difference(NamedTuple):
    """Of tensors from exact ones: rms relative to their rms, and the largest relative to their largest."""

    rms: float
    max: float


class Layer(NamedTuple):
    """One call of an operator of moekern's in a file, on what the file's own run gives it."""

    module: str
    op: str
    difference: Difference


def difference(exact: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> Difference:
    square = error = largest = worst = 0.0
    for e, g in zip(exact, got, strict=True):
        off = (e.double() - g.double()).abs()
        square, error = square + e.double().square().sum().item(), error + off.square().sum().item()
        if e.numel():
            largest, worst = max(largest, e.double().abs().max().item()), max(worst, off.max().item())
    if error == 0:
        return Difference(0.0, 0.0)
    return Difference((error / square) ** 0.5 if square else float("inf"), worst / largest if largest else float("inf"))


def peak_memory(run: Callable[[], Any]) -> tuple[Any, int | None]:
    """run(), and by how many bytes the process was larger at most; None where the kernel does not say."""
    status = Path("/proc/self/status")

    def kilobytes(key: str) -> int:
        found = re.search(rf"{key}:\s+(\d+) kB", status.read_text())
        return int(found[1]) if found else 0

    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present size
        before = kilobytes("VmRSS")
    except OSError:
        return run(), None
    result = run()
    return result, (kilobytes("VmHWM") - before) * 1024


class Probes:
    """What goes into calls and comes out of them, followed through what optimisation makes of a graph.

    Made before it, when it makes these values results of the graph: nothing else would make them outlive it.
    """

    def __init__(self, model: Any, calls: list[Call]) -> None:
        self.model, self.calls = model, calls
        every = dict.fromkeys(v for call in calls for v in values_in((call.arguments, call.outputs)))
        self._now: dict[Value, Value] = {v: v for v in every if v.is_graph_input()}
        self._before = [v for v in every if not v.is_graph_input()]
        self._results = len(model.graph.outputs)
        model.graph.outputs.extend(self._before)

    def settle(self) -> None:
        """After optimisation: they are no longer results, and where they are is known."""
        outputs = self.model.graph.outputs
        for before, now in zip(self._before, outputs[self._results :], strict=True):
            while now.producer() is not None and now.producer().op_type == "Identity":
                now = now.producer().inputs[0]
            self._now[before] = now
        del outputs[self._results :]

    def layers(self, path: Path, feeds: dict[str, torch.Tensor], modules: list[str], quantise: bool) -> list[Layer]:
        """Every call compared with its reference, on the inputs that it has in a run of the file by onnxruntime."""
        known = self._run(path, feeds)

        def tensor(value: Value) -> torch.Tensor | None:
            return known.get(self._now[value].name)  # None: nothing in the file depends on it

        found = []
        for module, call in zip(modules, self.calls, strict=True):
            arguments, got = replaced(call.arguments, tensor), [tensor(v) for v in call.outputs]
            try:
                exact, instead = compared(call.op, arguments, got, quantise)
            except AssertionError as wrong:
                raise RuntimeError(f"export: {module}: {call.op} in onnxruntime: {wrong}") from None
            found.append(Layer(module, call.op, difference(exact, instead)))
        return found

    def _run(self, path: Path, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The values of the probes by name; onnxruntime reads the file's own data."""
        import onnx

        model = onnx.load(path, load_external_data=False)
        constants = {v.name: v.const_value for v in self._now.values() if v.is_initializer()}
        found = {name: torch.from_numpy(x.numpy().copy()) for name, x in constants.items()}
        found |= feeds
        computed = {output for node in self.model.graph for output in node.outputs}
        kinds = {v.name: int(v.dtype) for v in self._now.values() if v in computed}
        numpy_has_none = {name: kind for name, kind in kinds.items() if kind in (BF16, *FP8.values())}
        results = {name: f"{name}.float" if name in numpy_has_none else name for name in kinds}
        for name in numpy_has_none:
            model.graph.node.append(onnx.helper.make_node("Cast", [name], [results[name]], to=FLOAT))
        del model.graph.output[:]
        for name, kind in kinds.items():
            to = FLOAT if name in numpy_has_none else kind
            model.graph.output.append(onnx.helper.make_tensor_value_info(results[name], to, None))
        beside = path.with_name(f"{path.name}.probes")
        onnx.save(model, beside)
        try:
            values = runtimes.onnxruntime(beside, feeds)
        finally:
            beside.unlink()
        for (name, kind), value in zip(kinds.items(), values, strict=True):
            found[name] = value.to(_TORCH[kind]) if name in numpy_has_none else value
        return found


_TORCH = {BF16: torch.bfloat16} | {number: DTYPES[format] for format, number in FP8.items()}
