"""GroupedLayout: which rows of a grouped operand belong to which group. Checked once, when it is made."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from typing import Any

import torch

from moekern import _C
from moekern.scaled import as_tensor

Integers = Any  # a 1-D integer tensor, an array that speaks DLPack, or a sequence of int


@dataclass(frozen=True, eq=False)
class GroupedLayout:
    """Group g owns rows starts[g] <= i < starts[g] + counts[g] of an operand of `rows` rows.

    starts, counts: [G] int64, copies of what was passed, so that nobody changes them afterwards.
    rows: of the whole operand. Rows of no group may lie before, between and after the groups.
    alignment: every group that has rows starts at a multiple of it. Kernels here take any; it is
        checked for those that rely on it.
    capacity: of a masked layout, the rows set aside for every group: the operand is [G, capacity, ...]
        and starts[g] = g * capacity. None for a contiguous layout, whose operand is [rows, ...].

    Groups ascend and share no row. What contradicts that, or does not fit, is a ValueError or TypeError
    that names the argument. Under torch.compile, where there are no values yet, the op checks them when it runs.

    check: to look at the values. On an accelerator that waits for them, here, in `slices` and in `repr`. With
        check=False nothing does, but for the constructors that take `rows`, where it is not given. Ops look again in
        CPU memory; on an accelerator their kernels leave out the rows that are not the operand's.
    """

    starts: torch.Tensor
    counts: torch.Tensor
    rows: int
    alignment: int = 1
    capacity: int | None = None
    check: InitVar[bool] = field(default=True, kw_only=True)

    def __post_init__(self, check: bool) -> None:
        _check_size("rows", self.rows, 0)
        _check_size("alignment", self.alignment, 1)
        for name in ("starts", "counts"):
            object.__setattr__(self, name, _integers(name, getattr(self, name)).clone())
        groups = len(self.starts)
        if len(self.counts) != groups:
            raise ValueError(f"counts has {len(self.counts)} elements and starts {groups}; both have one a group")
        if self.counts.device != self.starts.device:
            raise ValueError(f"counts is on {self.counts.device} and starts on {self.starts.device}")
        if self.capacity is not None:
            _check_size("capacity", self.capacity, 0)
            if self.rows != groups * self.capacity:
                raise ValueError(
                    f"rows is {self.rows}; {groups} groups of capacity {self.capacity} take {groups * self.capacity}"
                )
        if check and _readable(self.starts):
            starts, counts = self.starts.to("cpu"), self.counts.to("cpu")
            _C.check_layout(starts, counts, self.rows, self.alignment, self.capacity)

    @classmethod
    def unfilled(cls, starts: torch.Tensor, counts: torch.Tensor, rows: int, alignment: int) -> GroupedLayout:
        """Of tensors that a kernel is still to write to: neither looked at nor copied. For `prepare` of an op."""
        self = cls.__new__(cls)
        for name, value in (("starts", starts), ("counts", counts), ("rows", rows), ("alignment", alignment)):
            object.__setattr__(self, name, value)
        return self

    @classmethod
    def from_counts(
        cls, counts: Integers, alignment: int = 1, rows: int | None = None, *, check: bool = True
    ) -> GroupedLayout:
        """Groups one after another from row 0 on, each padded to a multiple of `alignment`.

        counts: [G] rows of each group. rows: of the operand, where it has more than the padded groups.
        """
        _check_size("alignment", alignment, 1)
        counts = _integers("counts", counts)
        ends = _round_up(counts, alignment).cumsum(0)
        return cls(_shifted(ends), counts, _last(ends) if rows is None else rows, alignment, check=check)

    @classmethod
    def from_offsets(
        cls, offsets: Integers, alignment: int = 1, rows: int | None = None, *, check: bool = True
    ) -> GroupedLayout:
        """Group g is rows offsets[g] to offsets[g + 1].

        offsets: [G + 1], prefix sums. rows: of the operand, where it has more than offsets[G].
        """
        offsets = _integers("offsets", offsets)
        if len(offsets) == 0:
            raise ValueError("offsets is empty; G groups have G + 1")
        if check:
            _check_ascending("offsets", offsets)
        return cls(offsets[:-1], offsets.diff(), _last(offsets) if rows is None else rows, alignment, check=check)

    @classmethod
    def from_ends(
        cls, ends: Integers, alignment: int = 1, rows: int | None = None, *, check: bool = True
    ) -> GroupedLayout:
        """Group g ends before row ends[g]; it starts where the one before ends, rounded up to `alignment`.

        ends: [G]. With alignment 1, the `offs` of torch's grouped_mm and scaled_grouped_mm; with 128,
            DeepGEMM's grouped_layout when use_psum_layout.
        rows: of the operand, where it has more than ends[G - 1].
        """
        _check_size("alignment", alignment, 1)
        ends = _integers("ends", ends)
        if check:
            _check_ascending("ends", ends)
        previous = _shifted(ends)
        starts = torch.where(ends == previous, previous, _round_up(previous, alignment))
        if check and _readable(ends) and (g := _first(starts > ends)) is not None:
            raise ValueError(f"ends[{g}] is {ends[g]}; by the alignment, {alignment}, the group starts at {starts[g]}")
        return cls(starts, ends - starts, _last(ends) if rows is None else rows, alignment, check=check)

    @classmethod
    def from_indices(cls, indices: Integers, num_groups: int, *, alignment: int, check: bool = True) -> GroupedLayout:
        """The group of every row, -1 where it is none: DeepGEMM's m_indices.

        indices: [rows]. All of them are read, not the first of a tile only.
        """
        _check_size("num_groups", num_groups, 0)
        indices = _integers("indices", indices)
        beyond = (indices < -1) | (indices >= num_groups)
        if not check:
            indices = indices.masked_fill(beyond, -1)
        elif _readable(indices) and (i := _first(beyond)) is not None:
            raise ValueError(f"indices[{i}] is {indices[i]}; it must be -1 or one of {num_groups} groups")
        before = torch.cat([indices.new_full((1,), -1), indices])  # padding takes the label of the group before it
        before = before.cummax(0).values
        if check and _readable(indices):
            opens = torch.cat([indices[:1] >= 0, (indices[1:] >= 0) & (indices[1:] != indices[:-1])])
            if (i := _first(opens & (indices <= before[:-1]))) is not None:
                raise ValueError(
                    f"indices[{i}] is {indices[i]} after a row of group {before[i]}; groups must ascend, each in one "
                    "piece"
                )
        # Bin 0 is of label -1. A group starts where all rows end that are of smaller labels, filled as above.
        starts = _histogram(before[1:] + 1, num_groups + 1).cumsum(0)[:-1]
        counts = _histogram(indices + 1, num_groups + 1)[1:]
        return cls(starts, counts, len(indices), alignment, check=check)

    @classmethod
    def from_masked(cls, counts: Integers, capacity: int, *, check: bool = True) -> GroupedLayout:
        """Of an operand [G, capacity, ...], the first counts[g] rows of each group: DeepGEMM's masked_m."""
        _check_size("capacity", capacity, 0)
        counts = _integers("counts", counts)
        return cls(_slots(counts, capacity), counts, len(counts) * capacity, 1, capacity, check=check)

    def __len__(self) -> int:
        """The number of groups."""
        return len(self.counts)

    def __repr__(self) -> str:
        form = f"alignment={self.alignment}" if self.capacity is None else f"capacity={self.capacity}"
        counts = self.counts.tolist() if _readable(self.counts) else "unknown"
        return f"GroupedLayout({len(self)} groups of {self.rows} rows, {form}, counts={counts})"

    def slices(self) -> list[slice]:
        """The rows of every group."""
        starts, counts = self.starts.tolist(), self.counts.tolist()
        return [slice(start, start + count) for start, count in zip(starts, counts, strict=True)]

    def indices(self) -> torch.Tensor:
        """The group of every row, -1 where it is none: [rows] int32, DeepGEMM's m_indices."""
        label = torch.arange(1, len(self) + 1, device=self.starts.device)
        starts, ends = (x.clamp(0, self.rows) for x in (self.starts, self.starts + self.counts))
        changes = label.new_zeros(self.rows + 1).index_add(0, starts, label).index_add(0, ends, -label)
        return (changes.cumsum(0)[:-1] - 1).to(torch.int32)


def at_hand(x: Integers) -> bool:
    """Whether a look at x's values waits for no accelerator: what code asks that makes layouts within a call."""
    return not isinstance(x, torch.Tensor) or x.device.type == "cpu"


def _integers(name: str, x: Integers) -> torch.Tensor:
    """x as a 1-D int64 tensor."""
    if isinstance(x, (list, tuple)):
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in x):
            raise TypeError(f"{name} is {x!r}; it must be integers")
        return torch.tensor(x, dtype=torch.int64)
    x = as_tensor(x, name)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} has dtype {x.dtype}; it must be torch.int32 or torch.int64")
    if x.dim() != 1:
        raise ValueError(f"{name} has shape {list(x.shape)}; it must have 1 dimension")
    return x.to(torch.int64)


def _check_size(name: str, size: Any, least: int) -> None:
    if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
        raise TypeError(f"{name} is {size!r}; it must be an integer")
    if size < least:
        raise ValueError(f"{name} is {size}; it must be at least {least}")


def _check_ascending(name: str, x: torch.Tensor) -> None:
    if not _readable(x):
        return
    if (g := _first(x < _shifted(x))) is not None:
        raise ValueError(f"{name}[{g}] is {x[g]}; it must not be less than {_shifted(x)[g]}, before it")


def _readable(x: torch.Tensor) -> bool:
    """Whether x has values to look at: not under a compiler, not a fake or other subclass, not meta."""
    return not torch.compiler.is_compiling() and type(x) is torch.Tensor and x.device.type != "meta"


def _first(wrong: torch.Tensor) -> int | None:
    return int(wrong.int().argmax()) if wrong.any() else None


def _last(x: torch.Tensor) -> int:
    return int(x[-1]) if len(x) else 0


def _shifted(x: torch.Tensor) -> torch.Tensor:
    """0, x[0], x[1], ...: as many as x has."""
    return torch.cat([x.new_zeros(1), x])[:-1]


def _histogram(x: torch.Tensor, bins: int) -> torch.Tensor:
    return x.new_zeros(bins).index_add(0, x, torch.ones_like(x))


def _round_up(x: torch.Tensor, step: int) -> torch.Tensor:
    return x if step == 1 else (x + step - 1) // step * step


def _slots(like: torch.Tensor, capacity: int) -> torch.Tensor:
    return torch.arange(len(like), device=like.device) * capacity
