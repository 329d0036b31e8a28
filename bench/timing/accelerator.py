"""Timing on a GPU or NPU: its own events, caches emptied between samples, its own limits in the same run.

`run` gives the same rows as the CPU's benchmark, so that tables, comparisons and the page take both.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from suites import Linear

import moekern
from moekern import Device, ScaledTensor, fp8_gemm_nt, per_block_cast_to_fp8, per_token_cast_to_fp8
from moekern.testing import moving
from moekern.testing.moving import Mover
from moekern.testing.numerics import check_bound, gemm_oracle
from timing.compete import Effort, Row
from timing.measure import Contender, Samples
from timing.problems import SAMPLED_COLS, SAMPLED_ROWS, nbytes

FLUSHED = 2  # times the last cache, written between samples
LEAST_FLUSHED = 512 << 20  # twice what AMD has behind the L2 that its driver tells of
COPIED = 1 << 30  # bytes that the copy limit reads, and writes
SQUARE = 8192  # of the torch matmul that is the compute limit


class Runtime(Protocol):
    """torch.cuda, torch.npu, or what a test puts in their place."""

    def Event(self, enable_timing: bool) -> Any: ...

    def synchronize(self) -> None: ...


@dataclass
class Clock:
    """Seconds of a call by the device's events, one call a sample, after the caches were filled with something else."""

    runtime: Runtime
    flush: Callable[[], object]

    def sample(self, call: Callable[[], object]) -> float:
        start, end = self.runtime.Event(enable_timing=True), self.runtime.Event(enable_timing=True)
        self.flush()
        start.record()
        call()
        end.record()
        self.runtime.synchronize()
        return start.elapsed_time(end) * 1e-3

    def interleave(self, contenders: list[Contender], budget: float, most: int) -> dict[str, Samples]:
        """In turns, as on the CPU: whatever clock and temperature the device has, all have it."""
        plans: list[tuple[Contender, int]] = []
        for contender in contenders:
            with contender.around():
                self.sample(lambda c=contender: c.call(0))  # type: ignore[misc]  # compiles, allocates
                once = self.sample(lambda c=contender: c.call(1))  # type: ignore[misc]
            plans.append((contender, max(3, min(most, int(budget / max(once, 1e-9))))))
        rounds = max(count for _, count in plans)
        samples = {contender.name: Samples() for contender, _ in plans}
        for i in range(rounds):
            first = i % len(plans)
            for contender, count in plans[first:] + plans[:first]:
                if (i + 1) * count // rounds > i * count // rounds:
                    with contender.around():
                        seconds = self.sample(lambda c=contender, t=i: c.call(t + 2))  # type: ignore[misc]
                    samples[contender.name].seconds.append(seconds)
        return samples


def clock(where: torch.device, runtime: Runtime | None = None, cache: int | None = None) -> Clock:
    """Of a device that torch names so."""
    if runtime is None:
        runtime = getattr(torch, where.type) if hasattr(torch, where.type) else importlib.import_module(where.type)
    if cache is None:
        properties = getattr(runtime, "get_device_properties", lambda _: None)(where)
        cache = getattr(properties, "L2_cache_size", 0) or 0
    buffer = torch.empty(max(FLUSHED * cache, LEAST_FLUSHED), dtype=torch.uint8, device=where)
    return Clock(runtime, buffer.zero_)


@dataclass
class Peaks:
    """The device's own limits as contenders: a copy, and torch's products in the types that it has."""

    where: torch.device
    copied: int = COPIED
    square: int = SQUARE
    contenders: list[Contender] = field(default_factory=list)

    def __post_init__(self) -> None:
        source = torch.empty(self.copied, dtype=torch.uint8, device=self.where)
        target = torch.empty_like(source)
        a = torch.randn(self.square, self.square, device=self.where, dtype=torch.bfloat16)
        self.contenders = [
            Contender("limit copy", lambda turn: target.copy_(source)),
            Contender("limit bf16", lambda turn: torch.mm(a, a.t())),
        ]
        fp8, one = a.to(torch.float8_e4m3fn), torch.ones((), device=self.where)
        try:
            torch._scaled_mm(fp8, fp8.t(), one, one, out_dtype=torch.bfloat16)
        except (RuntimeError, NotImplementedError, AttributeError):
            return  # the device, or torch for it, multiplies no FP8: bf16 is the limit
        self.contenders.append(
            Contender("limit fp8", lambda turn: torch._scaled_mm(fp8, fp8.t(), one, one, out_dtype=torch.bfloat16))
        )

    def of(self, samples: dict[str, Samples]) -> dict[str, float]:
        """Bytes and operations a second."""
        operations = 2 * self.square**3
        rates = [operations / samples[name].median for name in ("limit bf16", "limit fp8") if name in samples]
        copy = 2 * self.copied / samples["limit copy"].median
        return {"read": copy, "copy": copy, "multiply_add": max(rates)}


def found() -> list[tuple[torch.device, Device]]:
    return [(where, device) for where, device in moving.devices() if device.kind != "cpu"]


def _sampled(count: int, most: int) -> torch.Tensor:
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long()


def _check(out: torch.Tensor, a: Any, b: ScaledTensor) -> None:
    """Sampled rows and columns against float64, on the CPU."""
    i, j = _sampled(out.shape[0], SAMPLED_ROWS), _sampled(out.shape[1], SAMPLED_COLS)
    bits = b.data.view(torch.uint8)[j].view(b.data.dtype)
    some = ScaledTensor(bits, b.scale[j // b.block[0]], (1, b.block[1]))
    left = ScaledTensor(a.data.view(torch.uint8)[i].view(a.data.dtype), a.scale[i], a.block)
    check_bound(out.cpu()[i][:, j], gemm_oracle(fp8_gemm_nt, left, some))


def run(
    where: torch.device,
    device: Device,
    linears: Iterable[Linear],
    rows: Iterable[int],
    effort: Effort,
    timed: Clock | None = None,
    peaks: Peaks | None = None,
) -> tuple[list[Row], list[str]]:
    """fp8_gemm_nt, W8A8, on the device: rows whose limits are the device's own, and notes."""
    timed, peaks = timed or clock(where), peaks or Peaks(where)
    found_rows: list[Row] = []
    notes: list[str] = []
    for linear in linears:
        w = per_block_cast_to_fp8(torch.randn(linear.n, linear.k) * 0.02)
        for m in rows:
            x = per_token_cast_to_fp8(torch.randn(m, linear.k).bfloat16())
            there = Mover(where)
            a, b = there(x), there(w)
            out = torch.empty(m, linear.n, dtype=torch.bfloat16, device=where)
            kernel = fp8_gemm_nt.select(device, *fp8_gemm_nt.prepare(a, b, out=out))
            try:
                _check(fp8_gemm_nt(a, b, out=out), x, w)
            except AssertionError as wrong:
                notes.append(f"WRONG RESULT, not timed: fp8_gemm_nt {kernel.name} m={m} of {linear.name}: {wrong}")
                continue
            call = Contender("call", lambda turn, a=a, b=b, out=out: moekern.fp8_gemm_nt(a, b, out=out))
            samples = timed.interleave([call, *peaks.contenders], effort.budget, effort.most)
            limits = peaks.of(samples)
            flops, bytes = 2 * m * linear.n * linear.k, nbytes(x, w) + 2 * m * linear.n
            compute, memory = flops / limits["multiply_add"], bytes / limits["read"]
            found_rows.append(
                Row(
                    op="fp8_gemm_nt",
                    linear=linear.name,
                    shape={"m": m, "n": linear.n, "k": linear.k},
                    activations="fp8",
                    kernel=kernel.name,
                    selected=True,
                    flops=flops,
                    bytes=bytes,
                    moves="read",
                    samples=samples["call"],
                    limits=limits,
                    binds="fma" if compute > memory else "read",
                    fraction=max(compute, memory) / samples["call"].median,
                )
            )
    return found_rows, notes
