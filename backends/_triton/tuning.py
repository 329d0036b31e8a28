"""Measures tiles around those that the cost chooses, on a device that is here.

On operands whose sums have the same bits in every order (models/calls.py: Values), so that a candidate whose result has
others is wrong, and is left out. The first result is compared with the float64 reference.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from moekern.backends._triton.kernels import Family, kernels, taking
from moekern.backends._triton.targets import Target
from moekern.backends._triton.tiles import Shape, Tiles, cost
from moekern.backends._triton.tuned import Choose, Entry, class_of, replaceable
from moekern.op import Op
from moekern.ops import fp8_gemm_nt, fused_experts, m_grouped_fp8_gemm_nt_contiguous, m_grouped_fp8_gemm_nt_masked
from moekern.scaled import ScaledTensor

OPS = (fp8_gemm_nt, m_grouped_fp8_gemm_nt_contiguous, m_grouped_fp8_gemm_nt_masked, fused_experts)
_MOST = 16  # candidates measured for a shape
_GAIN = 0.97  # of the time by cost: what is nearer is noise
_SAMPLE = 64  # rows and columns of a result that are compared with the reference

Time = Callable[[Callable[[], None]], float]  # of a call, in microseconds


def device_time(call: Callable[[], None]) -> float:
    """By events, with the caches flushed before each repetition; the median."""
    from triton.testing import do_bench

    return 1000 * float(do_bench(call, warmup=10, rep=50, return_mode="median"))


@dataclass
class Outcome:
    """rejected: (tiles, reason) of candidates that failed or were wrong."""

    entry: Entry
    tried: int
    rejected: list[tuple[Tiles, str]] = field(default_factory=list)


class Tuner:
    def __init__(self, family: Family, target: Target, time: Time = device_time) -> None:
        self._family, self._target, self._time = family, target, time
        self._known: set[tuple[bool, Shape]] = set()

    def call(self, op: Op, prepared: tuple[Any, ...]) -> Iterator[Outcome]:
        """For every product of the call that none before it had. prepared: by `op.prepare`, operands on the device."""
        asked: dict[tuple[bool, Shape], Tiles] = {}
        by_cost = self._run(op, prepared, {}, asked)
        if by_cost is None:
            return
        if op is fp8_gemm_nt:
            check_dense(prepared)
        expected = prepared[op.output_index].clone()
        for (few, shape), tiles in asked.items():
            key = few, class_of(shape)
            if key in self._known:
                continue
            self._known.add(key)
            candidates = list(around(self._target, shape, tiles))
            default = self._time(by_cost)
            best, shortest, rejected = tiles, default, []
            for candidate in candidates:
                try:
                    run = self._run(op, prepared, {(few, shape): candidate}, {})
                    assert run is not None
                    check_same(op, prepared, expected)
                    time = self._time(run)
                except Exception as error:  # the compiler's and the driver's have no common class
                    rejected.append((candidate, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))
                    continue
                if time < min(shortest, _GAIN * default):
                    best, shortest = candidate, time
            yield Outcome(Entry(few, key[1], best, shortest, default), len(candidates), rejected)

    def _run(
        self, op: Op, prepared: tuple[Any, ...], instead: dict[tuple[bool, Shape], Tiles],
        asked: dict[tuple[bool, Shape], Tiles],
    ) -> Callable[[], None] | None:  # fmt: skip
        """The call, having run once with those tiles; None if no kernel takes it."""

        def choice(choose: Choose, few: bool) -> Choose:
            def chosen(target: Target, shape: Shape) -> Tiles:
                tiles = instead.get((few, shape)) or choose(target, shape)
                asked[few, shape] = tiles
                return tiles

            return chosen

        family = replace(
            self._family,
            target_of=lambda where: replace(self._target, product=""),  # not what was measured before
            choose=choice(self._family.choose, False),
            choose_for_few_rows=choice(self._family.choose_for_few_rows, True),
        )
        kernel = taking(kernels(family), op, prepared)
        if kernel is None:
            return None
        _bytes(prepared[op.output_index]).fill_(0xFF)
        kernel.run(*prepared)
        return lambda: kernel.run(*prepared)


def check_same(op: Op, prepared: tuple[Any, ...], expected: torch.Tensor) -> None:
    """Raises AssertionError where the result is not `expected`."""
    out = prepared[op.output_index]
    wrong = int((_bytes(out) != _bytes(expected)).sum())
    # h is no integer: rounding it, a unit of a million may go the other way where sums have another order
    if op is fused_experts and wrong <= out.numel() // 1000:
        far = (out.double() - expected.double()).abs().amax(1) > expected.double().abs().amax(1) / 64
        wrong = int(far.sum())
    assert not wrong, f"{wrong} bytes of the result differ from those of the tiles by cost"


def check_dense(prepared: tuple[Any, ...]) -> None:
    """Raises AssertionError where some rows and columns of fp8_gemm_nt's result are not the float64 reference's."""
    a, b, c, bias, out = prepared[:5]
    rows = torch.linspace(0, len(out) - 1, min(len(out), _SAMPLE)).long()
    columns = slice(0, _SAMPLE)
    reference = fp8_gemm_nt.reference(
        _rows(a, rows), _rows(b, torch.arange(len(b.data))[columns]),
        None if c is None else c[rows.to(c.device), columns].cpu(), None if bias is None else bias[columns].cpu(),
    )  # fmt: skip
    wrong = int((out[rows.to(out.device), columns].cpu() != reference.float().to(out.dtype)).sum())
    assert not wrong, f"{wrong} elements of {rows.numel()} rows are not the reference's, with the tiles by cost"


def around(target: Target, shape: Shape, tiles: Tiles) -> list[Tiles]:
    """The cheapest by cost of those that are half or twice as large, have other warps, stages, order or splits."""
    stages = [s for s in (tiles.stages - 1, tiles.stages, tiles.stages + 1) if s > 1]
    rows = [tiles.rows // 2, tiles.rows, 2 * tiles.rows]
    columns = [tiles.columns] if shape.paired else [tiles.columns // 2, tiles.columns, 2 * tiles.columns]
    warps = [tiles.warps] if tiles.specialised else [4, 8]
    splits = [1] if tiles.splits == 1 else [s for s in (tiles.splits // 2, tiles.splits, 2 * tiles.splits) if s > 1]
    found = []
    for r, c, w, s, parts in itertools.product(rows, columns, warps, stages, splits):
        one = replace(tiles, rows=r, columns=c, warps=w, stages=s, splits=parts)
        fits = 16 <= r <= 256 and 32 <= c <= 256 and parts <= 32
        if fits and one != tiles and replaceable(target, shape, tiles, one):
            found.append(one)
    found.sort(key=lambda one: (cost(target, one, shape), abs(one.stages - tiles.stages), abs(one.warps - tiles.warps)))
    return found[:_MOST]


def _bytes(out: torch.Tensor) -> torch.Tensor:
    return out.view(torch.uint8)


def _rows(x: Any, rows: torch.Tensor) -> Any:
    """Of an operand, in CPU memory."""
    if not isinstance(x, ScaledTensor):
        return x[rows.to(x.device)].cpu()
    where = rows.to(x.data.device)
    scale = x.scale[where // x.block[0]]
    data = x.data.view(torch.uint8)[where].view(x.data.dtype)
    return ScaledTensor(data.cpu(), scale.cpu(), (1, x.block[1]))
