"""GroupedLayout: every way to make one, and everything that it must refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moekern
from moekern import GroupedLayout


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def fields(layout: GroupedLayout) -> tuple[list[int], list[int], int, int, int | None]:
    return layout.starts.tolist(), layout.counts.tolist(), layout.rows, layout.alignment, layout.capacity


def test_from_counts() -> None:
    assert fields(GroupedLayout.from_counts([3, 0, 5])) == ([0, 3, 3], [3, 0, 5], 8, 1, None)
    assert fields(GroupedLayout.from_counts(int32(3, 0, 128, 1), 128)) == (
        [0, 128, 128, 256],
        [3, 0, 128, 1],
        384,
        128,
        None,
    )
    assert fields(GroupedLayout.from_counts(np.array([2, 2]), rows=9)) == ([0, 2], [2, 2], 9, 1, None)
    assert fields(GroupedLayout.from_counts([])) == ([], [], 0, 1, None)
    assert fields(GroupedLayout.from_counts([0, 0], 16)) == ([0, 0], [0, 0], 0, 16, None)


def test_from_offsets() -> None:
    assert fields(GroupedLayout.from_offsets([0, 3, 3, 8])) == ([0, 3, 3], [3, 0, 5], 8, 1, None)
    assert fields(GroupedLayout.from_offsets(int32(2, 6), alignment=2, rows=10)) == ([2], [4], 10, 2, None)
    assert fields(GroupedLayout.from_offsets([0])) == ([], [], 0, 1, None)


def test_from_ends() -> None:
    """torch's offs with alignment 1, DeepGEMM's psum layout with another."""
    assert fields(GroupedLayout.from_ends(int32(3, 3, 8))) == ([0, 3, 3], [3, 0, 5], 8, 1, None)
    assert fields(GroupedLayout.from_ends([3, 3, 129], 128, rows=256)) == ([0, 3, 128], [3, 0, 1], 256, 128, None)
    assert fields(GroupedLayout.from_ends([])) == ([], [], 0, 1, None)


def test_from_indices() -> None:
    labels = int32(-1, 0, 0, -1, 2, 2, -1)
    layout = GroupedLayout.from_indices(labels, 4, alignment=1)
    assert fields(layout)[1:] == ([2, 0, 2, 0], 7, 1, None)
    assert [layout.starts[g].item() for g in (0, 2)] == [1, 4]
    assert torch.equal(layout.indices(), labels)
    assert len(GroupedLayout.from_indices(int32(), 3, alignment=128)) == 3
    # Padding that carries its group's label, as older DeepGEMM has it, is rows of the group.
    assert fields(GroupedLayout.from_indices(int32(0, 0, 1, 1), 2, alignment=2)) == ([0, 2], [2, 2], 4, 2, None)


def test_from_masked() -> None:
    layout = GroupedLayout.from_masked(int32(1, 0, 4), 4)
    assert fields(layout) == ([0, 4, 8], [1, 0, 4], 12, 1, 4)
    assert layout.indices().tolist() == [0, -1, -1, -1, -1, -1, -1, -1, 2, 2, 2, 2]
    assert fields(GroupedLayout.from_masked([0, 0], 0)) == ([0, 0], [0, 0], 0, 1, 0)


def test_taken_at_its_word() -> None:
    """check=False looks at no values, whatever they are; the op does, where it can."""
    assert fields(GroupedLayout([0, -3], int32(7, 2), 4, check=False)) == ([0, -3], [7, 2], 4, 1, None)
    assert fields(GroupedLayout.from_counts([3, 5], rows=4, check=False)) == ([0, 3], [3, 5], 4, 1, None)
    assert fields(GroupedLayout.from_offsets([0, 5, 2], rows=4, check=False)) == ([0, 5], [5, -3], 4, 1, None)
    assert fields(GroupedLayout.from_ends([3, 1], 2, rows=4, check=False)) == ([0, 4], [3, -3], 4, 2, None)
    assert fields(GroupedLayout.from_masked([9], 4, check=False)) == ([0], [9], 4, 1, 4)
    beyond = GroupedLayout.from_indices([5, 0, -9, 1], 2, alignment=1, check=False)  # labels of no group are -1
    assert fields(beyond) == ([1, 3], [1, 1], 4, 1, None)
    weights = moekern.per_block_cast_to_fp8(torch.ones(2, 3))
    stack = moekern.ScaledTensor(weights.data.expand(2, 2, 3), weights.scale.expand(2, 1, 1))
    layout = GroupedLayout.from_counts([3, 5], rows=4, check=False)
    assert layout.indices().tolist() == [0, 0, 0, 1]
    with pytest.raises(ValueError, match=r"layout.rows is 4; group 1 starts at 3 and has 5"):
        moekern.m_grouped_fp8_gemm_nt_contiguous(torch.ones(4, 3), stack, layout)


@given(
    counts=st.lists(st.integers(0, 40), max_size=12),
    alignment=st.sampled_from([1, 2, 16, 128]),
    spare=st.integers(0, 50),
)
def test_forms_agree(counts: list[int], alignment: int, spare: int) -> None:
    layout = GroupedLayout.from_counts(counts, alignment)
    layout = GroupedLayout.from_counts(counts, alignment, rows=layout.rows + spare)
    labels = torch.full((layout.rows,), -1, dtype=torch.int32)
    for g, rows in enumerate(layout.slices()):
        assert len(labels[rows]) == counts[g] and (labels[rows] == -1).all() and rows.start % alignment == 0
        labels[rows] = g
    assert torch.equal(layout.indices(), labels)
    again = GroupedLayout.from_indices(labels, len(counts), alignment=alignment)
    assert again.counts.tolist() == counts and again.rows == layout.rows
    assert torch.equal(again.indices(), labels)
    if counts:
        ends = [rows.stop for rows in layout.slices()]
        psum = GroupedLayout.from_ends(ends, alignment, rows=layout.rows)
        assert torch.equal(psum.indices(), labels)


def test_a_layout_keeps_its_values() -> None:
    counts = torch.tensor([1, 2])
    starts = torch.tensor([0, 4])
    layout = GroupedLayout(starts, counts, 8)
    counts.fill_(100)
    starts.fill_(-1)
    assert fields(layout) == ([0, 4], [1, 2], 8, 1, None)
    with pytest.raises(AttributeError):
        layout.rows = 3  # type: ignore[misc]


def test_repr_and_len() -> None:
    layout = GroupedLayout.from_counts([3, 0, 5], 16)
    assert len(layout) == 3
    assert repr(layout) == "GroupedLayout(3 groups of 32 rows, alignment=16, counts=[3, 0, 5])"
    assert "capacity=4" in repr(GroupedLayout.from_masked([1], 4))


REFUSED: dict[str, tuple[str, Callable[[], Any]]] = {
    "starts a float": ("starts", lambda: GroupedLayout(torch.zeros(2), int32(1, 1), 2)),
    "starts 2-D": ("starts", lambda: GroupedLayout(int32(0, 1)[None], int32(1, 1), 2)),
    "starts None": ("starts", lambda: GroupedLayout(None, int32(1, 1), 2)),  # type: ignore[arg-type]
    "starts negative": ("starts", lambda: GroupedLayout(int32(-1), int32(1), 2)),
    "starts beyond rows": ("starts", lambda: GroupedLayout(int32(3), int32(0), 2)),
    "starts overflow": ("starts", lambda: GroupedLayout(torch.tensor([2**63 - 1]), torch.tensor([2]), 2)),
    "starts that overlap": ("starts", lambda: GroupedLayout(int32(0, 2), int32(3, 1), 4)),
    "starts that descend": ("starts", lambda: GroupedLayout(int32(2, 0), int32(2, 2), 4)),
    "starts of a masked layout": ("starts", lambda: GroupedLayout(int32(0, 3), int32(1, 1), 8, capacity=4)),
    "counts a string": ("counts", lambda: GroupedLayout.from_counts("12")),
    "counts of floats": ("counts", lambda: GroupedLayout.from_counts([1.5])),
    "counts of bools": ("counts", lambda: GroupedLayout.from_counts([True])),
    "counts int16": ("counts", lambda: GroupedLayout.from_counts(torch.zeros(2, dtype=torch.int16))),
    "counts a scalar": ("counts", lambda: GroupedLayout.from_counts(torch.tensor(3))),
    "counts of other groups": ("counts", lambda: GroupedLayout(int32(0, 1), int32(1), 2)),
    "counts negative": ("counts", lambda: GroupedLayout.from_counts([1, -1])),
    "counts on another device": ("counts", lambda: GroupedLayout(int32(0), int32(1).to("meta"), 2)),
    "counts masked negative": ("counts", lambda: GroupedLayout.from_masked([-1], 4)),
    "counts beyond the capacity": ("counts", lambda: GroupedLayout.from_masked([4, 5], 4)),
    "rows negative": ("rows", lambda: GroupedLayout(int32(), int32(), -1)),
    "rows a float": ("rows", lambda: GroupedLayout(int32(), int32(), 2.0)),  # type: ignore[arg-type]
    "rows too few": ("rows", lambda: GroupedLayout.from_counts([3, 5], rows=7)),
    "rows too few for offsets": ("rows", lambda: GroupedLayout.from_offsets([0, 8], rows=7)),
    "rows too few for ends": ("rows", lambda: GroupedLayout.from_ends([8], rows=7)),
    "rows against the capacity": ("rows", lambda: GroupedLayout(int32(0, 4), int32(1, 1), 9, capacity=4)),
    "alignment zero": ("alignment", lambda: GroupedLayout.from_counts([1], 0)),
    "alignment None": ("alignment", lambda: GroupedLayout.from_counts([1], None)),  # type: ignore[arg-type]
    "alignment a bool": ("alignment", lambda: GroupedLayout.from_ends([1], True)),
    "alignment of offsets": ("alignment", lambda: GroupedLayout.from_offsets([0, 5, 8], 4)),
    "alignment of indices": ("alignment", lambda: GroupedLayout.from_indices(int32(0, 0, 1), 2, alignment=128)),
    "alignment finer than asked": (
        "alignment",
        lambda: GroupedLayout.from_indices(GroupedLayout.from_counts([3, 5], 64).indices(), 2, alignment=128),
    ),
    "capacity negative": ("capacity", lambda: GroupedLayout.from_masked([0], -1)),
    "capacity a float": ("capacity", lambda: GroupedLayout.from_masked([0], 4.0)),  # type: ignore[arg-type]
    "offsets empty": ("offsets", lambda: GroupedLayout.from_offsets([])),
    "offsets that descend": ("offsets", lambda: GroupedLayout.from_offsets([0, 4, 3])),
    "offsets negative": ("offsets", lambda: GroupedLayout.from_offsets([-1, 3])),
    "ends that descend": ("ends", lambda: GroupedLayout.from_ends([4, 3])),
    "ends negative": ("ends", lambda: GroupedLayout.from_ends([-1])),
    "ends inside the padding": ("ends", lambda: GroupedLayout.from_ends([3, 100], 128)),
    "indices out of range": ("indices", lambda: GroupedLayout.from_indices([0, 2], 2, alignment=1)),
    "indices below -1": ("indices", lambda: GroupedLayout.from_indices([0, -2], 2, alignment=1)),
    "indices of no group": ("indices", lambda: GroupedLayout.from_indices([0], 0, alignment=1)),
    "indices interleaved": ("indices", lambda: GroupedLayout.from_indices([0, 1, 0], 2, alignment=1)),
    "indices that descend": ("indices", lambda: GroupedLayout.from_indices([1, 0], 2, alignment=1)),
    "indices that descend after padding": ("indices", lambda: GroupedLayout.from_indices([1, -1, 0], 2, alignment=1)),
    "indices with padding inside a group": (
        "indices",
        lambda: GroupedLayout.from_indices([0, -1, 0], 1, alignment=1),
    ),
    "num_groups negative": ("num_groups", lambda: GroupedLayout.from_indices([], -1, alignment=1)),
    "num_groups None": ("num_groups", lambda: GroupedLayout.from_indices([], None, alignment=1)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("argument", "call"), REFUSED.values(), ids=REFUSED)
def test_refused_with_the_argument_named(argument: str, call: Callable[[], Any]) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert str(caught.value).replace("[", " ").split()[0] == argument, str(caught.value)
