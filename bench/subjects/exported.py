"""Layers of experts exported to ONNX, in onnxruntime: `python bench/run.py onnx`. What doing without kernels costs.

Every mode takes turns with moekern's own kernel on the same weights, tokens and routing: the exported layer in float32,
as onnxruntime computes on CPUs, the native one in bf16, as an engine would call it. Last comes a model of 4 GB.
"""

from __future__ import annotations

import tempfile
import threading
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import packages
import torch
from report import bare_table, duration, show, spread
from rich.console import Console
from timing import machine
from timing.compete import Effort
from timing.measure import Contender, Samples, interleave

import moekern
from moekern import ExpertWeights, fused_experts
from subjects import moe, peak_memory

PACKAGES, INSTALL = ("onnx", "onnxscript", "onnxruntime"), "pip install 'moekern[onnx]'"
LAYERS = "qwen3-30b-a3b"
KINDS = (  # mode, form
    ("fp8-qdq", "sparse"),
    ("uint8-lut", "loop"),
    ("int8-qdq", "sparse"),
    ("bf16", "sparse"),
    ("ort-contrib", "contrib"),
    ("fp16", "dense"),
    ("fp8-qdq", "dense"),
)
QUICK_KINDS = KINDS[:2]
TOKENS, QUICK_TOKENS = (1, 8, 64), (1, 8)
BIG_LINEARS, BIG_SIZE = 60, 8192  # 60 x 64 MiB = 4.03 GB


@dataclass
class Result:
    layer: str
    mode: str
    form: str
    nodes: int
    bytes: int  # of the file
    export_seconds: float
    peak_bytes: int  # of a process that runs it
    error: float  # rms, relative to moekern's
    seconds: dict[int, tuple[Samples, Samples]]  # exported and native, by tokens

    def to_json(self) -> dict[str, Any]:
        times = {m: {"exported": a.to_json(), "native": b.to_json()} for m, (a, b) in self.seconds.items()}
        return {**{key: value for key, value in vars(self).items() if key != "seconds"}, "tokens": times}


class Layer(torch.nn.Module):
    """Experts as a module: tokens and their routing in, a sum for each out."""

    def __init__(self, weights: moe.Weights) -> None:
        super().__init__()
        self.options = weights.layer.options
        self.layouts = {}
        for name, experts in (("experts", weights.experts), ("shared", weights.shared)):
            self.layouts[name] = None if experts is None else experts.layout
            for i, tensor in enumerate(experts.tensors if experts is not None else ()):
                self.register_buffer(f"{name}{i}", tensor)

    def weights(self, name: str) -> ExpertWeights | None:
        own = [tensor for key, tensor in self.named_buffers() if key.startswith(name)]
        return ExpertWeights.from_tensors(own, self.layouts[name]) if own else None

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return fused_experts(x, self.weights("experts"), ids, weights, shared=self.weights("shared"), **self.options)


def run(
    console: Console, names: list[str], tokens: tuple[int, ...], quick: bool, effort: Effort
) -> tuple[dict[str, Any], list[str]]:
    if reason := packages.missing("onnx", PACKAGES, INSTALL):
        raise packages.Missing(reason)
    warnings.simplefilter("ignore", FutureWarning)  # torch.export's own
    found: list[Result] = []
    notes: list[str] = []
    for weights in moe.load(names):
        layer = weights.layer
        size = layer.expert_bytes * (layer.experts + layer.shared)
        console.print()
        console.print(
            f"[bold]{layer.model}[/] · {layer.experts} experts, top {layer.top_k} · H {layer.hidden} × "
            f"I {layer.intermediate} · {size / 1e9:.2f} GB{weights.said}",
            highlight=False,
        )
        of_layer = [result_of(weights, *kind, tokens, effort, notes) for kind in (QUICK_KINDS if quick else KINDS)]
        found += [result for result in of_layer if result is not None]
        show(console, _table([result for result in of_layer if result is not None], tokens))
    document: dict[str, Any] = {"layers": [result.to_json() for result in found]}
    if not quick:
        document["big"] = _big(console)
    return document, notes


class Session:
    """A file in onnxruntime, called as a Contender calls."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the other contender needs the cores
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._names = [slot.name for slot in self._session.get_inputs()]

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        feeds = dict(zip(self._names, (x.numpy() for x in inputs), strict=True))
        return torch.from_numpy(self._session.run(None, feeds)[0])


def result_of(
    weights: moe.Weights, mode: str, form: str, tokens: tuple[int, ...], effort: Effort, notes: list[str]
) -> Result | None:
    from moekern.onnx import export

    layer = weights.layer
    if mode in ("fp16", "bf16") and 8 * layer.expert_bytes * layer.experts > machine.memory_budget():
        notes.append(f"{mode} left out at {layer.model}: no memory for its weights in float32")
        return None
    cases = {count: moe.Case(weights, "even", count) for count in tokens}
    example = (cases[tokens[-1]].x.float(), *cases[tokens[-1]].routing(0))
    shapes = ({0: torch.export.Dim("tokens", min=1, max=65536)},) * 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.onnx"
        started = time.perf_counter()
        report = export(Layer(weights), example, path, mode=mode, moe=form, dynamic_shapes=shapes, verify=False)
        took = time.perf_counter() - started
        session = Session(path)
        found = [_against_native(session, case, effort) for case in cases.values()]
        del session
        peak = peak_memory.of_file(path, layer.hidden, layer.top_k, layer.experts)
    return Result(
        layer=layer.model,
        mode=mode,
        form=form,
        nodes=sum(report.nodes.values()),
        bytes=report.bytes,
        export_seconds=took,
        peak_bytes=peak,
        error=max(error for error, _ in found),
        seconds=dict(zip(cases, (times for _, times in found), strict=True)),
    )


def _against_native(session: Session, case: moe.Case, effort: Effort) -> tuple[float, tuple[Samples, Samples]]:
    """The exported layer's error from moekern's, and both's times in turns."""
    native, _ = case.runner("bf16")
    x = case.x.float()
    expected = native(0).float()
    error = ((session(x, *case.routing(0)) - expected).norm() / expected.norm()).item()
    contenders = [
        Contender("exported", lambda turn: session(x, *case.routing(turn))),
        Contender("native", native),
    ]
    samples = interleave(contenders, effort.budget, effort.most)
    return error, (samples["exported"], samples["native"])


def _table(found: list[Result], tokens: tuple[int, ...]) -> Any:
    table = bare_table()
    for column in ("mode", "experts", "nodes", "file", "exported in", "peak memory", "rms error"):
        table.add_column(column, justify="left" if column in ("mode", "experts") else "right")
    for count in tokens:
        table.add_column(f"T={count}", justify="right")
        table.add_column("moekern", justify="right")
    for result in found:
        times = []
        for exported, native in result.seconds.values():
            times += [
                f"{duration(exported.median)} {spread(exported)}",
                f"{exported.median / native.median:.1f}x faster",
            ]
        table.add_row(
            result.mode,
            result.form,
            str(result.nodes),
            f"{result.bytes / 1e9:.2f} GB",
            f"{result.export_seconds:.0f} s",
            f"{result.peak_bytes / result.bytes:.2f} of it",
            f"{result.error:.1e}",
            *times,
        )
    return table


class Linears(torch.nn.Module):
    """x -> x W^T, one weight after another, each in a file that is mapped."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        size = BIG_SIZE * BIG_SIZE
        data = torch.from_file(str(path), shared=True, size=BIG_LINEARS * size, dtype=torch.uint8)
        for i, part in enumerate(data.view(BIG_LINEARS, BIG_SIZE, BIG_SIZE).view(torch.float8_e4m3fn)):
            self.register_buffer(f"w{i}", part)
        self.register_buffer("scale", torch.full((BIG_SIZE // 128, BIG_SIZE // 128), 1e-4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(BIG_LINEARS):
            x = torch.tanh(moekern.fp8_gemm_nt(x, (getattr(self, f"w{i}"), self.scale)))
        return x


@dataclass
class Big:
    bytes: int
    export_seconds: float
    export_peak: int  # of memory of the process's own while it exported
    run_peak: int


def _big(console: Console) -> dict[str, Any]:
    """A file over 2 GB: what writing and running it takes."""
    from moekern.onnx import export

    with tempfile.TemporaryDirectory() as folder:
        weights, path = Path(folder) / "weights", Path(folder) / "big.onnx"
        codes = torch.randn(BIG_SIZE, BIG_SIZE).to(torch.float8_e4m3fn).view(torch.uint8)
        with weights.open("wb") as file:
            for i in range(BIG_LINEARS):
                file.write(codes.roll(i, 0).numpy().tobytes())
        model = Linears(weights)
        rows = torch.export.Dim("rows", min=1, max=4096)
        started = time.perf_counter()
        with _OwnMemory() as memory:
            report = export(model, (torch.randn(3, BIG_SIZE),), path, dynamic_shapes=({0: rows},), verify=False)
        took = time.perf_counter() - started
        big = Big(report.bytes, took, memory.peak, peak_memory.of_file(path, BIG_SIZE))
    console.print()
    console.print(
        f"[bold]{BIG_LINEARS} linear layers[/] of {BIG_SIZE} × {BIG_SIZE}, fp8-qdq: a file of "
        f"{big.bytes / 1e9:.2f} GB, exported in {big.export_seconds:.0f} s with {big.export_peak / 1e9:.2f} GB of "
        f"memory; a run takes {big.run_peak / big.bytes:.2f} of the file",
        highlight=False,
    )
    return asdict(big)


class _OwnMemory:
    """By how much the process's own memory, without mapped files, grew at most."""

    def __enter__(self) -> _OwnMemory:
        self.peak, self._start, self._over = 0, peak_memory.own(), threading.Event()
        self._watch = threading.Thread(target=self._look)
        self._watch.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.005):
            self.peak = max(self.peak, peak_memory.own() - self._start)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watch.join()
