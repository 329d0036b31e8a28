"""Kernels of CPUs that this machine is not: tests/native/runner in a process, one Executor per kernel.

Build with `cmake --workflow --preset aarch64` (g++-aarch64-linux-gnu, qemu-user-static: NEON, SVE) and
`cmake --workflow --preset emulated` (libsimde-dev: AVX-512 and AMX on any x86-64 with AVX2).
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import torch
from executors import Executor

from moekern import Device, ExpertWeights, GroupedLayout, Kernel, NotSupported, Op, ScaledTensor, ops
from moekern import op as dispatcher
from moekern.ops.experts import ACTIVATIONS
from moekern.testing.grouped_cases import products, rows_of

BUILD = Path(__file__).parents[1] / "build"
# 32-byte vectors: what sve_256 kernels are compiled for. The emulator's own default is 64.
LAUNCHERS = {"aarch64": ["qemu-aarch64-static", "-cpu", "max,sve-default-vector-length=32"], "emulated": []}
# Kernels that need no more than this run natively: the runner has them too, the tests not twice.
COMMON = {"aarch64": None, "emulated": frozenset({"avx2"})}
CASTS = (
    ops.per_token_cast_to_fp8,
    ops.per_block_cast_to_fp8,
    ops.per_channel_cast_to_fp8,
    ops.silu_mul_cast_to_fp8,
    ops.dequantize,
)
GROUPED = (
    ops.m_grouped_fp8_gemm_nt_contiguous,
    ops.m_grouped_fp8_gemm_nt_masked,
    ops.k_grouped_fp8_gemm_tn_contiguous,
)
TIMEOUT = 120  # seconds for one call: a deadlock must end

_DTYPES = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "e4m3fn",
    torch.float8_e4m3fnuz: "e4m3fnuz",
    torch.float8_e5m2: "e5m2",
    torch.float8_e8m0fnu: "ue8m0",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


class Crash(RuntimeError):
    """The runner died, of a kernel that left its operands' memory for instance."""


class Runner:
    """One process, kept for many calls. `device` and `kernels(op)` are what it found and offers."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.command = command
        self.process: subprocess.Popen[bytes] | None = None
        features, *rows = self._listing()
        self.device = Device("cpu", name, frozenset(features[1:]), name=" ".join(command))
        self._rows = [(family, kernel, frozenset(needs)) for _, family, kernel, *needs in rows]

    def kernels(self, op: Op) -> list[Kernel]:
        """The runner's kernels for `op`, best first, taking the spec's parameters in order."""
        family = "cast" if op in CASTS else "grouped" if op in GROUPED else op.name
        return [
            Kernel(
                name,
                functools.partial(self._call, op, name),
                "cpu",
                needs,
                functools.partial(self._refuses, op, name),
                for_few_rows=name.endswith("_stream"),
            )
            for found, name, needs in self._rows
            if found == family and not (op is ops.k_grouped_fp8_gemm_tn_contiguous and name.endswith("_stream"))
        ]

    def close(self) -> None:
        if self.process:
            self.process.communicate()
            self.process = None

    # ---- the protocol of tests/native/runner.cpp ---------------------------------------------------

    def _listing(self) -> list[list[str]]:
        with self._exchange("list", b"list\n"):
            return [line.split() for line in iter(self._line, "end")]

    def _call(self, op: Op, kernel: str, *args: Any) -> None:
        request = _Request(op, args)
        with self._exchange(kernel, request.encoded("run", kernel)):
            self._verdict()
            for memory in request.memories:
                if memory.writable:
                    memory.write_back(self._read(memory.bytes))

    def _refuses(self, op: Op, kernel: str, *args: Any) -> str | None:
        with self._exchange(kernel, _Request(op, args).encoded("ask", kernel)):
            try:
                self._verdict()
            except NotSupported as refusal:
                return str(refusal)
        return None

    def _exchange(self, what: str, request: bytes) -> _Exchange:
        if self.process is None:
            pipe = subprocess.PIPE
            # Without the sanitizer that may be preloaded here: it would catch the signal of a crash.
            environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
            self.process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment)
        return _Exchange(self, what, request)

    def _verdict(self) -> None:
        verdict, _, reason = self._line().partition(" ")
        if verdict == "refused":
            raise NotSupported(reason)
        if verdict != "done":
            raise RuntimeError(reason)

    def _line(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise EOFError
        return line.decode().rstrip("\n")

    def _read(self, count: int) -> bytes:
        data = self.process.stdout.read(count)
        if len(data) != count:
            raise EOFError
        return data


class _Exchange:
    """A request sent, its answer read within `TIMEOUT`. A dead process is a Crash, and the next call starts anew."""

    def __init__(self, runner: Runner, what: str, request: bytes) -> None:
        self.runner, self.what, self.request = runner, what, request

    def __enter__(self) -> None:
        process = self.runner.process
        self.timer = threading.Timer(TIMEOUT, process.kill)
        self.timer.start()
        try:
            process.stdin.write(self.request)
            process.stdin.flush()
        except BrokenPipeError as error:
            self.__exit__(BrokenPipeError, error, None)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.timer.cancel()
        if not isinstance(error, (EOFError, BrokenPipeError)):
            return
        runner, process = self.runner, self.runner.process
        code = process.wait()
        runner.process = None
        said = process.stderr.read().decode(errors="replace").strip()  # last words: they fit the pipe
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        raise Crash(f"{self.what}: {' '.join(runner.command)}: {how}. {said}") from None


# ---- operands ------------------------------------------------------------------------------------


class _Memory:
    """The bytes of a tensor from its first to its last element, whatever lies between: another tensor's, too."""

    def __init__(self, tensor: torch.Tensor, writable: bool) -> None:
        elements = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        flat = torch.as_strided(tensor, (elements if tensor.numel() else 0,), (1,))
        self.view = flat.view(torch.uint8)
        self.writable = writable
        self.bytes = self.view.numel()

    def sent(self) -> bytes:
        self.before = self.view.clone()
        return self.before.numpy().tobytes()

    def write_back(self, data: bytes) -> None:
        if data:
            after = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            written = after != self.before
            self.view[written] = after[written]


class _Request:
    """One call's operands: tensors that start at one address share a memory, as `c` and `out` may."""

    def __init__(self, op: Op, args: tuple) -> None:
        self.op = "cast_to_fp8" if op in CASTS[:3] else op.name
        self.options: list[str] = []
        self.lines: list[str] = []
        self.memories: list[_Memory] = []
        self._memory_at: dict[int, int] = {}
        named = dict(zip(op.params, args, strict=True))
        if op in GROUPED:
            for g, product in enumerate(_products(op, **named)):
                self._add_all(f"{g}.", product)
        else:
            self._add_all("", named)

    def _add_all(self, prefix: str, named: dict[str, Any]) -> None:
        out = named.pop("out")
        outputs = {f"out.{k}": v for k, v in out._asdict().items()} if isinstance(out, tuple) else {"out": out}
        for name, value in outputs.items():
            self._add(prefix + name, value, writable=True)
        for name, value in named.items():
            if isinstance(value, (torch.Tensor, ScaledTensor)):
                self._add(prefix + name, value, writable=name == "workspace")
            elif isinstance(value, ExpertWeights):
                self._add_experts(name, value)
            elif name == "activation":
                self.options.append(f"activation {ACTIVATIONS.index(value)}")
            elif name == "scoring":
                self.options.append(f"sigmoid {int(value == 'sigmoid')}")
            elif isinstance(value, (bool, int, float)) and math.isfinite(value):  # infinity is what an absent one means
                self.options.append(f"{name} {float(value)!r}")

    def _add_experts(self, name: str, experts: ExpertWeights) -> None:
        for e, projections in enumerate(experts.projections()):
            for which, (matrix, bias) in zip(("gate", "up", "down"), projections, strict=True):
                self._add(f"{name}.{e}.{which}", matrix, writable=False)
                if bias is not None:
                    self._add(f"{name}.{e}.{which}.bias", bias, writable=False)
        for key, value in (
            ("count", experts.num_experts),
            ("hidden", experts.hidden_size),
            ("intermediate", experts.intermediate_size),
            ("up_first", experts.up_first),
        ):
            self.options.append(f"{name}.{key} {value}")

    def _add(self, name: str, value: torch.Tensor | ScaledTensor, writable: bool) -> None:
        if isinstance(value, GroupedLayout):
            self._add_matrix(f"{name}.starts", value.starts, (1, 1), False)
            self._add_matrix(f"{name}.counts", value.counts, (1, 1), False)
        elif isinstance(value, ScaledTensor):
            self._add_matrix(name, value.data, (1, 1), writable)
            self._add_matrix(f"{name}.scale", value.scale, value.block, writable)
        else:
            self._add_matrix(name, value, (1, 1), writable)

    def _add_matrix(self, name: str, tensor: torch.Tensor, block: tuple[int, int], writable: bool) -> None:
        shape = (1, 1, *tensor.shape)[-2:]
        strides = (0, 0, *tensor.stride())[-2:]
        address = tensor.data_ptr()
        if not tensor.numel() or address not in self._memory_at:
            self._memory_at[address] = len(self.memories)
            self.memories.append(_Memory(tensor, writable))
        fields = (*shape, strides[0], 1 if shape[1] == 1 else strides[1], *block, self._memory_at[address])
        self.lines.append(" ".join(map(str, (name, _DTYPES[tensor.dtype], *fields))))

    def encoded(self, verb: str, kernel: str) -> bytes:
        counts = (dispatcher.policy.num_threads or 2, len(self.options), len(self.lines), len(self.memories))
        head = " ".join(map(str, (verb, self.op, kernel, *counts)))
        parts = ["\n".join([head, *self.options, *self.lines, ""]).encode()]
        for memory in self.memories:
            parts += [f"{memory.bytes} {int(memory.writable)}\n".encode(), memory.sent(), b"\n"]
        return b"".join(parts)


def _products(
    op: Op, a: Any, b: Any, layout: GroupedLayout, out: torch.Tensor, c: torch.Tensor | None = None, **_: Any
) -> list[dict[str, Any]]:
    """Every group's product, as fp8_gemm_nt would have it."""
    if op is ops.k_grouped_fp8_gemm_tn_contiguous:
        parts = [(rows_of(a, rows).T, rows_of(b, rows).T) for rows in layout.slices()]
        return [
            {"a": left, "b": right, "c": None if c is None else c[g], "out": out[g]}
            for g, (left, right) in enumerate(parts)
        ]
    rows = layout.slices() if layout.capacity is None else [slice(0, n) for n in layout.counts.tolist()]
    outs = [(out if layout.capacity is None else out[g])[part] for g, part in enumerate(rows)]
    return [{"a": left, "b": right, "out": d} for (left, right), d in zip(products(a, b, layout), outs, strict=True)]


# ---- what has been built -------------------------------------------------------------------------


def program(name: str) -> Path:
    return BUILD / name / "tests" / "native" / "runner"


def why_not(name: str) -> str | None:
    """Why the runner `name` cannot be started here, or None."""
    if not program(name).exists():
        return f"not built; cmake --workflow --preset {name}"
    if LAUNCHERS[name] and not shutil.which(LAUNCHERS[name][0]):
        return f"{LAUNCHERS[name][0]} is not installed"
    return None


@functools.cache
def runner(name: str) -> Runner:
    """The runner "aarch64" or "emulated", started once; `why_not(name)` must be None."""
    return Runner(name, [*LAUNCHERS[name], str(program(name))])


def executors(op: Op) -> list[Executor]:
    """The kernels of every runner that can be started: "aarch64:cpu.neon". A source for executors.sources."""
    return [
        _executor(op, runner(name), kernel)
        for name in LAUNCHERS
        if why_not(name) is None
        for kernel in runner(name).kernels(op)
        if COMMON[name] is None or not kernel.needs <= COMMON[name]
    ]


def _executor(op: Op, where: Runner, kernel: Kernel) -> Executor:
    def run(*args: Any, **kwargs: Any) -> Any:
        call = op.prepare(*args, **kwargs)
        kernel.run(*call)
        return call[op.output_index]

    def refuses(*args: Any, **kwargs: Any) -> str | None:
        return kernel.refuses(*op.prepare(*args, **kwargs))

    every = 4 if LAUNCHERS[where.device.arch] else 1
    return Executor(
        op,
        f"{where.device.arch}:{kernel.name}",
        run,
        kernel.lacks(where.device),
        refuses,
        asks=False,
        threads=(1, 3),
        every=lambda case: every,
    )
