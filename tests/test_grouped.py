"""Grouped products: every kernel on every case, and what holds for all of them."""

from __future__ import annotations

import functools
from typing import Any

import executors
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shapes import near

import moekern
from moekern import GroupedLayout, GroupedWeights, ScaledTensor
from moekern.scaled import DTYPES
from moekern.testing import cases, grouped_cases
from moekern.testing.grouped_cases import KGrouped, MGrouped
from moekern.testing.numerics import GemmOracle, check_bound, check_exact, check_rms

M_OPS = (moekern.m_grouped_fp8_gemm_nt_contiguous, moekern.m_grouped_fp8_gemm_nt_masked)
OPS = (*M_OPS, moekern.k_grouped_fp8_gemm_tn_contiguous)


@functools.lru_cache(maxsize=2)  # a case and its exact twin, for all kernels in turn
def m_grouped_problem(case: MGrouped) -> tuple[tuple[Any, ...], GemmOracle]:
    a, b, layout = grouped_cases.m_grouped_operands(case)
    return (a, b, layout), grouped_cases.m_grouped_oracle(case.op, a, b, layout)


@functools.lru_cache(maxsize=2)
def k_grouped_oracle(case: KGrouped) -> GemmOracle:
    a, b, layout, c, _ = grouped_cases.k_grouped_operands(case)
    return grouped_cases.k_grouped_oracle(a, b, layout, c)


def run_m_grouped(executor: executors.Executor, case: MGrouped) -> tuple[torch.Tensor, GemmOracle]:
    """The rows that one kernel writes on one case, and what they should be."""
    (a, b, layout), oracle = m_grouped_problem(case)
    out = grouped_cases.m_grouped_output(case, layout)
    executor(a, b, layout, out)
    assert cases.only_written(out), "wrote outside of out"
    assert grouped_cases.untouched(out, layout), "wrote to rows that belong to no group"
    return grouped_cases.owned(out, layout), oracle


def run_k_grouped(executor: executors.Executor, case: KGrouped) -> tuple[torch.Tensor, GemmOracle]:
    oracle = k_grouped_oracle(case)
    a, b, layout, c, out = grouped_cases.k_grouped_operands(case)  # new ones: `out` may be c
    executor(a, b, layout, c, out)
    assert cases.only_written(out), "wrote outside of out"
    return out.flatten(0, 1), oracle


def problems(*ops: moekern.Op) -> list[tuple[executors.Executor, Any]]:
    found = (*grouped_cases.M_GROUPED, *grouped_cases.K_GROUPED)
    kernels = {op: executors.executors(op) for op in ops}
    return [(e, case) for case in found for e in kernels[case.op]]


@pytest.mark.parametrize(("executor", "case"), problems(*OPS), ids=str)
def test_grouped(executor: executors.Executor, case: Any) -> None:
    run: Any = run_m_grouped if isinstance(case, MGrouped) else run_k_grouped
    if (exact := grouped_cases.exact(case)) is not None:
        check_exact(*run(executor, exact))
    result, oracle = run(executor, case)
    check_bound(result, oracle)
    check_rms(result, oracle)


# ---- weights -----------------------------------------------------------------------------------------


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


@executors.of(*M_OPS)
@pytest.mark.parametrize("a", ["bf16", "e4m3fn"])
def test_forms_of_weights_give_equal_bits(executor: executors.Executor, a: str) -> None:
    """A stack, a pair, GroupedWeights, a list of either kind of matrix."""
    case = MGrouped((3, 0, 17, 40), 129, 264, a=a, capacity=None if executor.op is M_OPS[0] else 40)
    left, b, layout = grouped_cases.m_grouped_operands(case)
    assert isinstance(b, ScaledTensor)
    matrices = [ScaledTensor(cases.place(w.data), cases.place(w.scale), w.block) for w in map(b.group, range(4))]
    expected = executor(left, b, layout)
    for form in ((b.data, b.scale), GroupedWeights(matrices), matrices, [tuple(w) for w in matrices]):
        assert same(executor(left, form, layout), expected)


def test_grouped_weights_keep_the_memory_they_were_made_of() -> None:
    """Deleted owners and parameters that are given other memory change nothing."""
    a, b, layout = grouped_cases.m_grouped_operands(MGrouped((2, 3), 130, 200))
    assert isinstance(b, ScaledTensor)
    expected = moekern.m_grouped_fp8_gemm_nt_contiguous(a, b, layout)
    owners = [torch.nn.Parameter(b.data[g].clone(), requires_grad=False) for g in range(2)]
    scales = [b.scale[g].clone() for g in range(2)]
    weights = GroupedWeights(list(zip(owners, scales, strict=True)))
    for owner in owners:
        owner.data = torch.zeros_like(owner.data)
    del owners, scales
    torch.full((2, 130, 200), 0x7F, dtype=torch.uint8)  # into what may have been freed
    assert same(moekern.m_grouped_fp8_gemm_nt_contiguous(a, weights, layout), expected)
    assert len(weights) == 2 and weights.shape == (2, 130, 200) and weights.group(1).shape == (130, 200)
    assert repr(weights) == "GroupedWeights(2 of [130, 200] torch.float8_e4m3fn, block=(128, 128))"


def test_weights_are_read_where_they_lie() -> None:
    """What is written to a weight after GroupedWeights was made counts."""
    a, b, layout = grouped_cases.m_grouped_operands(MGrouped((2, 3), 30, 200))
    assert isinstance(b, ScaledTensor)
    matrices = [b.group(g) for g in range(2)]
    weights = GroupedWeights(matrices)
    matrices[1].scale.mul_(2)
    result = moekern.m_grouped_fp8_gemm_nt_contiguous(a, weights, layout, out_dtype=torch.float32)
    assert same(result, moekern.m_grouped_fp8_gemm_nt_contiguous(a, b, layout, out_dtype=torch.float32))


# ---- rows of no group --------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [None, 6])
@pytest.mark.parametrize("a", ["f32", "e4m3fn"])
def test_a_result_allocated_here_has_zeros_where_no_group_writes(capacity: int | None, a: str) -> None:
    case = MGrouped((5, 0, 1), 40, 130, a=a, capacity=capacity, alignment=16, spare=3)
    left, b, layout = grouped_cases.m_grouped_operands(case)
    for _ in range(3):
        torch.full((1 << 12,), torch.nan)  # what the allocator hands out again
        result = case.op(left, b, layout)
        unowned = (layout.indices() < 0).view(result.shape[:-1])
        assert (result[unowned] == 0).all() and result.isfinite().all()


def test_accumulation_in_place() -> None:
    a, b, layout, c, _ = grouped_cases.k_grouped_operands(KGrouped((128, 0, 40), 20, 70, c="f32", values="integers"))
    assert c is not None
    expected = moekern.k_grouped_fp8_gemm_tn_contiguous(a, b, layout, c)
    assert same(expected[1], c[1])  # a group without rows
    before = c.clone()
    assert moekern.k_grouped_fp8_gemm_tn_contiguous(a, b, layout, c, out=c) is c
    assert same(c, expected) and not same(c, before)
    assert (moekern.k_grouped_fp8_gemm_tn_contiguous(a, b, layout)[1] == 0).all()


# ---- DeepGEMM's layouts ------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", [1, 64, 128])
def test_every_label_counts(alignment: int) -> None:
    """Labels at a finer alignment than some kernel's tile: each row meets the weights its own label names."""
    case = MGrouped((3, 70, 0, 1, 64), 66, 200, alignment=alignment, out="f32")
    a, b, layout = grouped_cases.m_grouped_operands(case)
    assert isinstance(a, torch.Tensor)
    labels = layout.indices()
    by_label = GroupedLayout.from_indices(labels, len(layout), alignment=alignment)
    result = moekern.m_grouped_fp8_gemm_nt_contiguous(a, b, by_label, out_dtype=torch.float32)
    for i, g in enumerate(labels.tolist()):
        if g >= 0:
            alone = moekern.fp8_gemm_nt(a[i : i + 1], b.group(g), out_dtype=torch.float32)
            torch.testing.assert_close(result[i], alone[0], rtol=1e-5, atol=1e-5)
    if alignment == 64:
        with pytest.raises(ValueError, match="alignment is 128; group 1 starts at 64"):
            GroupedLayout.from_indices(labels, len(layout), alignment=128)


# ---- the same bits -----------------------------------------------------------------------------------

THREADED = (
    MGrouped((1, 0, 30, 5, 1, 130), 300, 264),
    MGrouped((1, 2, 3, 4), 530, 1160, a="e4m3fn", out="f32"),
    MGrouped((20, 0, 7), 600, 264, capacity=33),
    KGrouped((256, 0, 100, 384), 130, 300),
)


def call(case: Any, executor: executors.Executor) -> torch.Tensor:
    if isinstance(case, MGrouped):
        result: torch.Tensor = executor(*grouped_cases.m_grouped_operands(case))
        return result
    a, b, layout, c, _ = grouped_cases.k_grouped_operands(case)
    result = executor(a, b, layout, c)
    return result


@pytest.mark.parametrize(
    ("executor", "case"), [(e, case) for case in THREADED for e in executors.executors(case.op)], ids=str
)
def test_any_number_of_threads(executor: executors.Executor, case: Any) -> None:
    results = []
    for threads in executor.threads:
        with moekern.use(num_threads=threads):
            results.append(call(case, executor))
    assert all(same(result, results[0]) for result in results)


@executors.of(*M_OPS)
@pytest.mark.parametrize("a", ["bf16", "e4m3fn"])
def test_a_group_does_not_depend_on_the_others(executor: executors.Executor, a: str) -> None:
    """Alone it has the bits that it has among groups of NaN and of enormous values."""
    counts = (5, 20, 3, 1)
    case = MGrouped(counts, 129, 520, a=a, out="f32", capacity=None if executor.op is M_OPS[0] else 20)
    left, b, layout = grouped_cases.m_grouped_operands(case)
    together = grouped_cases.owned(executor(left, b, layout, out_dtype=torch.float32), layout)
    for g in range(len(counts)):
        hostile = replaced(left, layout, others_than=g)
        result = grouped_cases.owned(executor(hostile, b, layout, out_dtype=torch.float32), layout)
        own = slice(sum(counts[:g]), sum(counts[: g + 1]))
        assert same(result[own], together[own]), f"group {g} changes with the others"


def replaced(a: Any, layout: GroupedLayout, others_than: int) -> Any:
    """The operand with NaN and the largest values in the rows of the other groups."""
    index = layout.indices()
    other = ((index >= 0) & (index != others_than)).view(a.shape[:-1])
    x = (a.scale if isinstance(a, ScaledTensor) else a).clone()
    x[other] = torch.tensor([torch.nan, 3e38]).to(x.dtype)[torch.arange(int(other.sum())) % 2].unsqueeze(1)
    return ScaledTensor(a.data, x, a.block) if isinstance(a, ScaledTensor) else x


@pytest.mark.parametrize("a", ["bf16", "e4m3fn"])
@pytest.mark.parametrize("capacity", [None, 70])
def test_batch_invariant(a: str, capacity: int | None) -> None:
    """`use(batch_invariant=True)`: a row has the same bits at every number of rows of its group."""
    whole, b, _ = grouped_cases.m_grouped_operands(MGrouped((70, 70), 150, 700, a=a))
    rows = grouped_cases.rows_of
    op = moekern.m_grouped_fp8_gemm_nt_contiguous

    def results(count: int) -> torch.Tensor:
        parts = [rows(whole, slice(70 * g, 70 * g + count)) for g in range(2)]
        if capacity is None:
            layout = GroupedLayout.from_counts((count, count))
            return op(joined(parts, torch.cat), b, layout, out_dtype=torch.float32).view(2, count, -1)
        layout = GroupedLayout.from_masked((count, count), count)
        return moekern.m_grouped_fp8_gemm_nt_masked(joined(parts, torch.stack), b, layout, out_dtype=torch.float32)

    few = results(2)
    with moekern.use(batch_invariant=True):
        together = results(70)
        for count in (1, 2, 3, 7, 8, 15, 16, 17, 33, 64):
            assert same(results(count), together[:, :count])
        if "cpu.scalar" not in moekern.explain(op, whole, b, GroupedLayout.from_counts((70, 70))).splitlines()[0]:
            assert not same(few, together[:, :2]), "nothing to hold: few rows take no other kernel here"


def joined(parts: list[Any], join: Any) -> Any:
    if isinstance(parts[0], ScaledTensor):
        data = join([x.data.view(torch.uint8) for x in parts]).view(parts[0].data.dtype)
        return ScaledTensor(data, join([x.scale for x in parts]), parts[0].block)
    return join(parts)


# ---- shapes that nobody thought of -------------------------------------------------------------------

LAYOUTS = st.sampled_from(["rows", "padded", "columns", "every_other"])
COUNTS = st.lists(near(1, 8, 16, 64, most=140), max_size=5).map(tuple)
FORMATS = st.sampled_from(sorted(DTYPES))


def m_grouped_cases(masked: bool) -> st.SearchStrategy[MGrouped]:
    def case(counts: tuple[int, ...], separate: bool, spare: int, **others: Any) -> MGrouped:
        capacity = max(counts, default=0) + spare if masked else None
        separate = separate and bool(counts)  # a list of no weights has no shape
        return MGrouped(counts, capacity=capacity, separate=separate, spare=0 if masked else spare, **others)

    return st.builds(
        case,
        counts=COUNTS,
        separate=st.booleans(),
        spare=st.integers(0, 3),
        n=near(1, 16, 32, 64, 128, most=200),
        k=near(1, 32, 64, 128, most=390),
        a=st.sampled_from(["bf16", "f16", "f32", *DTYPES]),
        b=FORMATS,
        alignment=st.sampled_from([1, 16, 128]),
        out=st.sampled_from([None, "f32", "bf16", "f16"]),
        block_b=st.sampled_from([(128, 128), (1, 128), (1, 0), (0, 0), (64, 128)]),
        scale=st.sampled_from(["f32", "ue8m0"]),
        layout_a=LAYOUTS,
        layout_b=LAYOUTS,
        layout_out=LAYOUTS,
        values=st.just("integers"),
    )


k_grouped_cases = st.builds(
    KGrouped,
    counts=COUNTS,
    m=near(1, 16, 32, 128, most=140),
    n=near(1, 16, 32, 128, most=140),
    a=st.sampled_from(["bf16", "f32", *DTYPES]),
    b=FORMATS,
    out=st.sampled_from([None, "bf16"]),
    c=st.sampled_from([None, "out", "f32"]),
    spare=st.integers(0, 3),
    scale=st.sampled_from(["f32", "ue8m0"]),
    layout_a=LAYOUTS,
    layout_b=LAYOUTS,
    layout_out=LAYOUTS,
    values=st.just("integers"),
)


@executors.of(*OPS)
@settings(max_examples=40)
@given(data=st.data())
def test_any_groups(executor: executors.Executor, data: st.DataObject) -> None:
    if executor.absent:
        pytest.skip(f"{executor.name} {executor.absent}")
    try:
        if executor.op in M_OPS:
            result, oracle = run_m_grouped(executor, data.draw(m_grouped_cases(executor.op is M_OPS[1])))
        else:
            result, oracle = run_k_grouped(executor, data.draw(k_grouped_cases))
    except pytest.skip.Exception:  # this example only: another may be taken
        return
    check_exact(result, oracle)
