"""The grouped problems that every kernel runs, as data, and the operands that a problem stands for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from moekern import ops
from moekern.layout import GroupedLayout
from moekern.op import Op
from moekern.scaled import DTYPES, ScaledTensor
from moekern.testing.cases import (
    FLOATS,
    VALUES,
    Fill,
    Values,
    fp8_data,
    place,
    poisoned,
    scale_grid,
    storable,
    whole_block,
)
from moekern.testing.numerics import GemmOracle, gemm_oracle
from moekern.weights import GroupedWeights

Operand = Any  # a float tensor, or a ScaledTensor
UNTOUCHED = 77.0  # what `out` holds where no group writes


@dataclass(frozen=True)
class MGrouped:
    """One call of an m-grouped product: masked if it has a capacity."""

    counts: tuple[int, ...]
    n: int
    k: int
    a: str = "bf16"
    b: str = "e4m3fn"
    capacity: int | None = None
    alignment: int = 1
    spare: int = 0  # rows behind the last group
    out: str | None = None  # a dtype; None leaves it to the op
    separate: bool = False  # weights that are not one tensor
    block_a: tuple[int, int] = (1, 128)  # 0 is the whole extent
    block_b: tuple[int, int] = (128, 128)
    scale: str = "f32"  # or "ue8m0"
    layout_a: str = "rows"
    layout_b: str = "rows"
    layout_out: str = "rows"
    values: str = "normal"

    def __str__(self) -> str:
        return _name(self, f"{self.n}x{self.k}-{self.a}-{self.b}")

    @property
    def op(self) -> Op:
        return ops.m_grouped_fp8_gemm_nt_contiguous if self.capacity is None else ops.m_grouped_fp8_gemm_nt_masked

    @property
    def layout(self) -> GroupedLayout:
        if self.capacity is not None:
            return GroupedLayout.from_masked(self.counts, self.capacity)
        layout = GroupedLayout.from_counts(self.counts, self.alignment)
        return replace(layout, rows=layout.rows + self.spare)


@dataclass(frozen=True)
class KGrouped:
    """One call of the k-grouped product: d [groups, m, n], the groups having `counts` rows."""

    counts: tuple[int, ...]
    m: int
    n: int
    a: str = "e4m3fn"
    b: str = "e4m3fn"
    out: str | None = None
    c: str | None = None  # a dtype, or "out" to accumulate in place
    alignment: int = 128
    spare: int = 0
    block_a: tuple[int, int] = (128, 1)
    block_b: tuple[int, int] = (128, 1)
    scale: str = "f32"
    layout_a: str = "rows"
    layout_b: str = "rows"
    layout_out: str = "rows"
    values: str = "normal"

    def __str__(self) -> str:
        return _name(self, f"{self.m}x{self.n}-{self.a}-{self.b}")

    @property
    def op(self) -> Op:
        return ops.k_grouped_fp8_gemm_tn_contiguous

    @property
    def layout(self) -> GroupedLayout:
        layout = GroupedLayout.from_counts(self.counts, self.alignment)
        return replace(layout, rows=layout.rows + self.spare)


def _name(case: MGrouped | KGrouped, head: str) -> str:
    shown = ("counts", "m", "n", "k", "a", "b")
    tail = [
        f"{f.name}={value}".replace(" ", "")
        for f in fields(case)
        if f.name not in shown and (value := getattr(case, f.name)) != f.default
    ]
    return "-".join(["+".join(map(str, case.counts)) or "none", head, *tail])


# ---- operands ----------------------------------------------------------------------------------------


def _stacked(parts: list[torch.Tensor], layout: str, count: int) -> torch.Tensor:
    """The first `count` of some matrices as a stack that `place` placed; "apart" leaves rows of poison behind each."""
    rows, cols = parts[0].shape
    if layout == "apart":
        poison = poisoned(2 * cols, parts[0].dtype).view(2, cols)
        return _stacked([_cat([x, poison]) for x in parts], "rows", count)[:, :rows]
    return place(_cat(parts), layout).unflatten(0, (len(parts), rows))[:count]


def _cat(parts: list[torch.Tensor]) -> torch.Tensor:
    dtype = parts[0].dtype
    return torch.cat([x.view(storable(dtype)) for x in parts]).view(dtype)


def _stack(parts: list[Operand], layout: str, count: int) -> Operand:
    if isinstance(parts[0], ScaledTensor):
        data, scale = [x.data for x in parts], [x.scale for x in parts]
        return ScaledTensor(_stacked(data, layout, count), _stacked(scale, "padded", count), parts[0].block)
    return _stacked(parts, layout, count)


def _placed(x: Operand, layout: str) -> Operand:
    """One matrix."""
    stack = _stack([x], layout, 1)
    return stack.group(0) if isinstance(stack, ScaledTensor) else stack[0]


def _matrix(
    g: torch.Generator, shape: tuple[int, int], dtype: str, block: tuple[int, int], scale: str, values: Values
) -> Operand:
    if dtype in FLOATS:
        return values.floats(g, shape).to(FLOATS[dtype])
    block = whole_block(block, shape)
    return ScaledTensor(fp8_data(g, shape, dtype, values), scale_grid(g, shape, block, scale, values), block)


def _poison_rows(x: Operand, rows: torch.Tensor) -> None:
    """Make rows NaN, and the scales that are theirs alone."""
    for part in (x.data, x.scale) if isinstance(x, ScaledTensor) else (x,):
        if len(part) == len(rows):
            nan = poisoned(part.shape[1], part.dtype).view(storable(part.dtype))
            part.view(storable(part.dtype))[rows] = nan


def _unowned(layout: GroupedLayout) -> torch.Tensor:
    """Which rows belong to no group: [rows], or [G, capacity]."""
    unowned = layout.indices() < 0
    return unowned if layout.capacity is None else unowned.view(len(layout), layout.capacity)


def m_grouped_operands(case: MGrouped, seed: int = 0) -> tuple[Operand, ScaledTensor | GroupedWeights, GroupedLayout]:
    """(a, b, layout). Rows of a that belong to no group are NaN, their scales too."""
    g = torch.Generator().manual_seed(seed)
    values, layout = VALUES[case.values], case.layout
    groups = len(layout)
    weights = [_matrix(g, (case.n, case.k), case.b, case.block_b, case.scale, values) for _ in range(max(groups, 1))]
    if case.separate:
        b: Any = GroupedWeights([_placed(w, case.layout_b) for w in weights])
    else:
        b = _stack(weights, case.layout_b, groups)
    unowned = _unowned(layout)
    if case.capacity is None:
        a = _matrix(g, (layout.rows, case.k), case.a, case.block_a, case.scale, values)
        _poison_rows(a, unowned)
        return _placed(a, case.layout_a), b, layout
    slots = [
        _matrix(g, (case.capacity, case.k), case.a, case.block_a, case.scale, values) for _ in range(max(groups, 1))
    ]
    for slot, rows in zip(slots, unowned, strict=False):
        _poison_rows(slot, rows)
    return _stack(slots, case.layout_a, groups), b, layout


def m_grouped_output(case: MGrouped, layout: GroupedLayout) -> torch.Tensor:
    """NaN where a group has to write, UNTOUCHED elsewhere."""
    unowned = _unowned(layout)
    dtype = FLOATS[case.out or (case.a if case.a in FLOATS else "bf16")]
    out = torch.full((*unowned.shape, case.n), torch.nan, dtype=dtype)
    out[unowned] = UNTOUCHED
    if case.capacity is None:
        return place(out, case.layout_out)
    return _stacked(list(out) or [out.new_full((case.capacity, case.n), torch.nan)], case.layout_out, len(layout))


def k_grouped_operands(
    case: KGrouped, seed: int = 0
) -> tuple[Operand, ScaledTensor, GroupedLayout, torch.Tensor | None, torch.Tensor]:
    """(a, b, layout, c, out). Rows of no group are NaN, and so is `out` unless it is c."""
    g = torch.Generator().manual_seed(seed)
    values, layout = VALUES[case.values], case.layout
    unowned = _unowned(layout)
    operands = []
    for dtype, columns, block, where in (
        (case.a, case.m, case.block_a, case.layout_a),
        (case.b, case.n, case.block_b, case.layout_b),
    ):
        x = _matrix(g, (layout.rows, columns), dtype, block, case.scale, values)
        _poison_rows(x, unowned)
        operands.append(_placed(x, where))
    nothing = torch.full((len(layout), case.m, case.n), torch.nan, dtype=FLOATS[case.out or "f32"])
    out = _stacked(list(nothing) or [nothing.new_full((case.m, case.n), torch.nan)], case.layout_out, len(layout))
    if case.c is None:
        return operands[0], operands[1], layout, None, out
    addend: Fill = VALUES["normal" if values.rounds else "integers"].floats
    sums = addend(g, (len(layout) * case.m, case.n)).view(nothing.shape)
    if case.c == "out":
        out.copy_(sums)
        return operands[0], operands[1], layout, out, out
    parts = list(sums.to(FLOATS[case.c])) or [sums.new_empty(case.m, case.n)]
    return operands[0], operands[1], layout, _stacked(parts, case.layout_out, len(layout)), out


# ---- oracles -----------------------------------------------------------------------------------------


def rows_of(x: Operand, rows: slice) -> Operand:
    """Rows of an operand, the first of which begins a block of scales."""
    if not isinstance(x, ScaledTensor):
        return x[rows]
    block = x.block[0]
    first = rows.start // block if x.scale.shape[0] > 1 else 0
    grid = slice(first, first + -(-(rows.stop - rows.start) // block))
    return ScaledTensor(x.data[rows], x.scale[grid], x.block)


def products(a: Operand, b: Any, layout: GroupedLayout) -> list[tuple[Operand, ScaledTensor]]:
    """The operands of every group's product, as `fp8_gemm_nt` takes them."""
    if layout.capacity is None:
        return [(rows_of(a, rows), b.group(g)) for g, rows in enumerate(layout.slices())]
    of_group = a.group if isinstance(a, ScaledTensor) else a.__getitem__
    counts = layout.counts.tolist()
    return [(rows_of(of_group(g), slice(0, count)), b.group(g)) for g, count in enumerate(counts)]


def m_grouped_oracle(op: Op, a: Operand, b: Any, layout: GroupedLayout) -> GemmOracle:
    """Of the rows that belong to groups, one after another: the op's reference, with the bounds of every product."""
    reference = op.reference(a, b, layout)
    parts = [gemm_oracle(ops.fp8_gemm_nt, *product) for product in products(a, b, layout)]
    return _joined(reference[~_unowned(layout)], parts)


def k_grouped_oracle(a: Operand, b: ScaledTensor, layout: GroupedLayout, c: torch.Tensor | None = None) -> GemmOracle:
    """Of the groups' matrices below one another."""
    reference = ops.k_grouped_fp8_gemm_tn_contiguous.reference(a, b, layout, c)
    parts = [
        gemm_oracle(ops.fp8_gemm_nt, rows_of(a, rows).T, rows_of(b, rows).T, None if c is None else c[g])
        for g, rows in enumerate(layout.slices())
    ]
    return _joined(reference.flatten(0, 1), parts)


def _joined(reference: torch.Tensor, parts: list[GemmOracle]) -> GemmOracle:
    """Oracles below one another; of none, an empty one."""

    def joined(name: str) -> torch.Tensor:
        columns = [getattr(part, name).expand(part.reference.shape) for part in parts]
        return torch.cat(columns) if columns else reference

    return GemmOracle(reference, *(joined(f.name) for f in fields(GemmOracle)[1:]))


def owned(out: torch.Tensor, layout: GroupedLayout) -> torch.Tensor:
    """The rows of `out` that groups write, one after another."""
    return out[~_unowned(layout)]


def untouched(out: torch.Tensor, layout: GroupedLayout) -> bool:
    """Whether the rows of no group hold what m_grouped_output put there."""
    return bool((out[_unowned(layout)] == UNTOUCHED).all())


# ---- the lists ---------------------------------------------------------------------------------------

_MIXED = (3, 0, 17, 1, 40)  # around the few rows that stream and the many that are packed, and none


def _m_grouped() -> Iterator[MGrouped]:
    for a in ("bf16", "e4m3fn"):
        for alignment in (1, 16, 128):
            yield MGrouped(_MIXED, 129, 264, a=a, alignment=alignment, spare=alignment // 2 + 3)
        yield MGrouped(_MIXED, 129, 264, a=a, separate=True)
        yield MGrouped(_MIXED, 129, 264, a=a, capacity=40)
        yield MGrouped(_MIXED, 129, 264, a=a, capacity=57, separate=True)
        # Edges of n and k that a block size does not divide: 4.5 blocks, 6 blocks, parts of one.
        for n, k in ((576, 520), (520, 576), (768, 128), (7, 33), (1, 1)):
            yield MGrouped((2, 19, 0, 1), n, k, a=a)
            yield MGrouped((2, 19, 0, 1), n, k, a=a, capacity=19)
    # One group has all rows; every group has one; nobody has any.
    for counts in ((0, 0, 21, 0), (5,), (0, 128), (1,) * 9, (0, 0, 0), (0,), ()):
        yield MGrouped(counts, 65, 130)
        yield MGrouped(counts, 65, 130, a="e4m3fn", spare=2)
        yield MGrouped(counts, 65, 130, capacity=max(counts, default=3))
    for n, k in ((0, 130), (5, 0)):
        for a in ("bf16", "e4m3fn"):
            yield MGrouped((2, 18), n, k, a=a)
            yield MGrouped((2, 18), n, k, a=a, capacity=20)
    yield MGrouped((0, 0), 5, 130, capacity=0)
    # Formats, output types, scales.
    for b in DTYPES:
        for a in (*FLOATS, *DTYPES):
            yield MGrouped((2, 19), 65, 264, a=a, b=b, out="f32", separate=b == "e5m2")
    for out in FLOATS:
        yield MGrouped((5, 20), 70, 136, out=out)
        yield MGrouped((5, 20), 70, 136, a="e4m3fn", out=out, capacity=21)
    for block_b in ((1, 128), (1, 0), (0, 0), (128, 0), (32, 128), (48, 0)):
        yield MGrouped((4, 20), 161, 300, block_b=block_b, out="f32")
        yield MGrouped((4, 20), 161, 300, a="e4m3fn", block_b=block_b, separate=True)
    for block_a in ((1, 0), (0, 0), (1, 256)):
        yield MGrouped((4, 20), 40, 300, a="e4m3fn", block_a=block_a)
    yield MGrouped((4, 20), 40, 300, a="e4m3fn", block_a=(16, 128), alignment=16)
    yield MGrouped((4, 150), 40, 300, a="e4m3fn", block_a=(128, 128), alignment=128)
    yield MGrouped((4, 20), 40, 300, a="e4m3fn", block_a=(3, 128), capacity=23)
    for capacity in (None, 20):
        yield MGrouped((4, 20), 161, 300, capacity=capacity, scale="ue8m0")
        yield MGrouped((4, 20), 161, 300, capacity=capacity, a="e5m2", scale="ue8m0", block_b=(1, 128))
    # Memory.
    for layout in ("padded", "columns", "every_other"):
        for capacity in (None, 22):
            yield MGrouped((3, 20), 66, 267, capacity=capacity, layout_a=layout, layout_out=layout)
            yield MGrouped((3, 20), 66, 267, capacity=capacity, a="e4m3fn", layout_a=layout, layout_b=layout)
        yield MGrouped((3, 20), 66, 267, layout_b=layout, separate=True)
    yield MGrouped((3, 20), 66, 267, capacity=22, layout_a="apart", layout_b="apart", layout_out="apart")
    yield MGrouped((3, 20), 66, 267, a="e4m3fn", layout_b="apart", capacity=22, layout_a="apart")
    # Hostile values.
    for values in ("codes", "all codes", "outliers", "rows apart", "zeros", "scales apart", "nan", "nan and inf"):
        yield MGrouped((2, 19), 66, 300, a="f32", values=values)
        yield MGrouped((2, 19), 66, 300, a="e4m3fn", values=values, capacity=19, out="f32")
    yield MGrouped((2, 19), 66, 300, a="e4m3fn", values="nan scales")


def _k_grouped() -> Iterator[KGrouped]:
    # Any number of rows: none, fewer than a block, a block exactly, which went wrong elsewhere, and more.
    for counts in ((128, 0, 256, 128), (128,), (128,) * 4, (0, 0), (0, 100, 300), (1, 127, 129), ()):
        yield KGrouped(counts, 97, 70)
        yield KGrouped(counts, 97, 70, a="bf16", spare=5)
        yield KGrouped(counts, 3, 130, c="f32")
    for m, n in ((1, 1), (576, 40), (40, 576), (0, 5), (5, 0)):
        yield KGrouped((130, 128), m, n, c="out")
    for b in DTYPES:
        for a in (*FLOATS, *DTYPES):
            yield KGrouped((70, 200), 33, 65, a=a, b=b)
    for out in FLOATS:
        for c in (None, "out", "bf16"):
            yield KGrouped((128, 0, 40), 20, 70, out=out, c=c)
    for block in ((128, 128), (0, 1), (0, 0), (256, 1)):
        yield KGrouped((256, 70), 40, 150, alignment=256, block_a=block, block_b=block)
    yield KGrouped((70, 5), 40, 150, alignment=1, block_a=(0, 1), block_b=(0, 1))
    yield KGrouped((128, 40), 40, 150, scale="ue8m0")
    for layout in ("padded", "columns", "every_other"):
        yield KGrouped((128, 40), 33, 66, layout_a=layout, layout_b=layout)
        yield KGrouped((128, 40), 33, 66, a="f32", layout_a=layout, layout_out=layout, c="out")
    yield KGrouped((128, 40), 33, 66, layout_out="apart", c="bf16")
    for values in ("codes", "all codes", "zeros", "scales apart", "nan scales"):
        yield KGrouped((128, 40), 33, 66, values=values)
    for values in ("outliers", "rows apart", "nan and inf"):
        yield KGrouped((128, 40), 33, 66, a="f32", values=values)


M_GROUPED = tuple(_m_grouped())
K_GROUPED = tuple(_k_grouped())


def exact(case: Any) -> Any:
    """The same problem on small integers, when its own values are ordinary ones."""
    return replace(case, values="integers") if case.values == "normal" else None
