"""moe_permute and moe_unpermute: every kernel against the references, and the properties that hold for all ids."""

from __future__ import annotations

from typing import Any

import executors
import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st

import moekern
from moekern import Permuted, ScaledTensor, moe_permute, moe_unpermute, permuted_rows
from moekern.scaled import DTYPES
from moekern.testing import cases, routing_cases
from moekern.testing.routing_cases import Permute, Unpermute, marked
from moekern.testing.routing_numerics import check_unpermute, sum_in_order


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def end_of(layout: moekern.GroupedLayout) -> int:
    """The rows that the groups take, padding included."""
    aligned = (layout.counts + layout.alignment - 1) // layout.alignment * layout.alignment
    return int((layout.starts + aligned).max()) if len(layout) else 0


def check_rows(got: torch.Tensor, expected: torch.Tensor, end: int, what: str, cast: bool) -> None:
    """The rows of the groups to the bit, the rows behind them untouched, the memory around untouched.

    cast: a NaN is as good as any other.
    """
    differs = bits(got[:end]) != bits(expected[:end])
    if cast:
        differs &= ~(got[:end].float().isnan() & expected[:end].float().isnan())
    wrong = differs.any(1)
    if wrong.any():
        raise AssertionError(f"row {int(wrong.int().argmax())} of {what} differs ({int(wrong.sum())} of {end})")
    rest = got[end:]
    assert torch.equal(bits(rest), bits(marked(*rest.shape, rest.dtype))), f"wrote to {what} behind the last group"
    assert cases.only_written(got), f"wrote outside of {what}"


@executors.of(moe_permute)
@pytest.mark.parametrize("case", routing_cases.PERMUTE, ids=str)
def test_permute(executor: executors.Executor, case: Permute) -> None:
    arguments, options = routing_cases.permute_operands(case)
    expected = moe_permute.reference(*arguments, **options)
    out = routing_cases.permute_output(case, arguments[0])
    got = executor(*arguments, **options, out=out)
    assert got.x is out.x and got.inverse is out.inverse
    assert torch.equal(got.inverse, expected.inverse), "inverse differs"
    assert cases.only_written(out.inverse.view(torch.float32)), "wrote outside of out.inverse"
    for field in ("starts", "counts"):
        assert torch.equal(getattr(got.layout, field), getattr(expected.layout, field)), f"{field} differ"
    assert got.layout.alignment == case.alignment and got.layout.rows == got.x.shape[0]
    end = end_of(expected.layout)
    for what, moved, right in zip(
        ("x", "x.scale"),
        tuple(got.x) if isinstance(got.x, ScaledTensor) else (got.x,),
        tuple(expected.x) if isinstance(expected.x, ScaledTensor) else (expected.x,),
        strict=False,
    ):
        check_rows(moved, right, end, what, case.format is not None)


@executors.of(moe_unpermute)
@pytest.mark.parametrize("case", routing_cases.UNPERMUTE, ids=str)
def test_unpermute(executor: executors.Executor, case: Unpermute) -> None:
    """Within the bound of the float64 reference, and to the bit what the promised order of roundings gives."""
    y, inverse, weights = routing_cases.unpermute_operands(case)
    out = routing_cases.unpermute_output(case)
    executor(y, inverse, weights, out=out)
    assert cases.only_written(out), "wrote outside of out"
    check_unpermute(out, y, inverse, weights)
    expected = sum_in_order(y, inverse, weights).to(out.dtype)
    both_nan = out.isnan() & expected.isnan()
    differs = (bits(out) != bits(expected)) & ~both_nan
    assert not differs.any(), f"out{differs.nonzero()[0].tolist()} has other bits than the sum in order"


# ---- properties --------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    experts = draw(st.sampled_from([1, 2, 3, 8, 16, 160, 513]))
    topk = draw(st.integers(0, 32))
    tokens = draw(st.integers(0, 40))
    kind = draw(st.sampled_from(["any", "skips", "one", "all of them", "nothing"]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if kind == "all of them":  # k = E: every token to every expert, in any order
        topk = min(experts, 32)
        experts = topk
        ids = torch.stack([torch.randperm(experts, generator=g) for _ in range(tokens)] or [torch.zeros(topk)])[:tokens]
    else:
        ids = torch.randint(-1 if kind == "skips" else 0, experts, (tokens, topk), generator=g)
        ids = torch.full_like(ids, {"one": experts - 1, "nothing": -1}[kind]) if kind in ("one", "nothing") else ids
    return {
        "ids": ids.to(draw(st.sampled_from([torch.int32, torch.int64]))),
        "experts": experts,
        "alignment": draw(st.sampled_from([1, 2, 3, 16, 128])),
        "hidden": draw(st.sampled_from([0, 1, 7, 33, 64])),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        "generator": g,
    }


@executors.of(moe_permute)
@settings(max_examples=60)
@given(problem=problems())
def test_any_permutation(executor: executors.Executor, problem: dict[str, Any]) -> None:
    """Counts add up, starts are aligned, an expert's rows are in the order of the slots, padding is zero."""
    if executor.absent:
        pytest.skip(f"{executor.name} {executor.absent}")
    ids, experts, alignment = problem["ids"], problem["experts"], problem["alignment"]
    note(str({k: v for k, v in problem.items() if k != "ids"} | {"shape": list(ids.shape)}))
    x = torch.randn(len(ids), problem["hidden"], generator=problem["generator"]).to(problem["dtype"])
    moved, layout, inverse = executor(x, ids, experts, alignment=alignment)
    assert layout.rows == moved.shape[0] == permuted_rows(*ids.shape, experts, alignment)
    assert int(layout.counts.sum()) == int((ids >= 0).sum())
    assert torch.equal(layout.counts, torch.bincount(ids[ids >= 0].long().flatten(), minlength=experts))
    assert not (layout.starts % alignment).any() and end_of(layout) <= layout.rows
    assert torch.equal(inverse >= 0, ids >= 0)
    for expert in range(experts) if experts < 20 else (0, experts - 1):
        rows = inverse[ids == expert]
        start = int(layout.starts[expert])
        assert rows.tolist() == list(range(start, start + len(rows))), f"rows of expert {expert}"
    rows = inverse[ids >= 0].long()
    assert torch.equal(moved[rows], x.repeat_interleave(ids.shape[1], 0)[(ids >= 0).flatten()])
    padding = torch.ones(end_of(layout), dtype=torch.bool)
    padding[rows] = False
    assert not bits(moved[: len(padding)][padding]).any(), "padding is not zero"


@executors.of(moe_permute)
@settings(max_examples=40)
@given(problem=problems())
def test_there_and_back(executor: executors.Executor, problem: dict[str, Any]) -> None:
    """unpermute(permute(x)) with weights that add up to 1 is x: exactly for one slot, else within rounding."""
    if executor.absent:
        pytest.skip(f"{executor.name} {executor.absent}")
    ids, g = problem["ids"], problem["generator"]
    x = torch.randn(len(ids), problem["hidden"], generator=g).to(problem["dtype"])
    moved = executor(x, ids, problem["experts"], alignment=problem["alignment"])
    kept = ids >= 0
    weights = torch.rand(ids.shape, generator=g) * kept
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-30)
    back = moe_unpermute(moved.x, moved.inverse, weights, out_dtype=torch.float32)
    some = kept.any(1, keepdim=True)
    torch.testing.assert_close(back, torch.where(some, x.float(), 0), rtol=1e-5, atol=1e-6)
    if ids.shape[1]:
        first = moe_unpermute(moved.x, moved.inverse[:, :1])
        assert torch.equal(first, torch.where(kept[:, :1], x, torch.zeros((), dtype=x.dtype)))


@executors.of(moe_permute)
def test_one_slot_is_the_identity_for_every_value(executor: executors.Executor) -> None:
    """Every bf16 there is: NaN stays NaN, -0 stays -0."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).reshape(256, 256)
    ids = torch.randint(0, 9, (256, 1), generator=torch.Generator().manual_seed(0))
    moved = executor(x, ids, 9)
    assert torch.equal(bits(moved.x[moved.inverse[:, 0].long()]), bits(x))
    back = moe_unpermute(moved.x, moved.inverse)
    number = ~x.isnan()
    assert torch.equal(back.view(torch.int16)[number], x.view(torch.int16)[number]) and back.isnan()[~number].all()


def test_permuted_rows_suffice_and_no_fewer_would() -> None:
    for alignment in (1, 2, 5, 128):
        for tokens, topk, experts in ((0, 2, 4), (1, 1, 1), (3, 2, 4), (7, 3, 5), (64, 8, 3)):
            rows = permuted_rows(tokens, topk, experts, alignment)
            slots, used = tokens * topk, min(experts, tokens * topk)
            counts = [1] * used  # as many experts as possible with as little as possible, the rest on one of them
            if used:
                counts[0] += slots - used
            worst = sum(-(-count // alignment) * alignment for count in counts)
            assert worst <= rows <= worst + alignment * (used > 0), (tokens, topk, experts, alignment)
            assert rows % alignment == 0


@executors.of(moe_permute)
def test_permute_for_any_number_of_threads(executor: executors.Executor) -> None:
    case = Permute(400, 700, 16, 4, routing="skips", alignment=8)
    arguments, options = routing_cases.permute_operands(case)
    results = []
    for threads in executor.threads:
        with moekern.use(num_threads=threads):
            results.append(executor(*arguments, **options))
    end = end_of(results[0].layout)
    for result in results:
        assert torch.equal(result.x[:end], results[0].x[:end]) and torch.equal(result.inverse, results[0].inverse)


@executors.of(moe_unpermute)
def test_unpermute_for_any_number_of_threads(executor: executors.Executor) -> None:
    arguments = routing_cases.unpermute_operands(Unpermute(500, 700, 4, 900))
    results = []
    for threads in executor.threads:
        with moekern.use(num_threads=threads):
            results.append(executor(*arguments))
    assert all(torch.equal(result, results[0]) for result in results)


def test_out_may_have_just_the_rows_that_are_needed() -> None:
    x, ids = torch.randn(6, 10), torch.tensor([[0, 1]] * 6)
    needed = Permuted(torch.zeros(16, 10), None, torch.zeros(6, 2, dtype=torch.int32))
    got = moe_permute(x, ids, 4, alignment=8, out=needed)
    assert got.layout.rows == 16 < permuted_rows(6, 2, 4, 8)
    assert torch.equal(moe_unpermute(got.x, got.inverse), x + x)
    short = Permuted(torch.zeros(15, 10), None, needed.inverse)
    with pytest.raises(ValueError, match=r"out\.x has 15 rows; these ids take 16"):
        moe_permute(x, ids, 4, alignment=8, out=short)


@pytest.mark.parametrize("round_scale_up", [False, True])
@pytest.mark.parametrize("format", DTYPES)
def test_casting_on_the_way_is_casting_first(format: str, round_scale_up: bool) -> None:
    """To the bit, NaN included."""
    x = cases.VALUES["nan and inf"].floats(torch.Generator().manual_seed(0), (9, 300)).bfloat16()
    ids = torch.tensor([[0, 2], [2, -1], [1, 0]] * 3)
    one = moe_permute(x, ids, 3, alignment=4, format=format, round_scale_up=round_scale_up)
    other = moe_permute(moekern.per_token_cast_to_fp8(x, format, round_scale_up), ids, 3, alignment=4)
    assert one.x.format == format and one.x.block == (1, 128) == other.x.block
    end = end_of(other.layout)
    for got, expected in zip(one.x, other.x, strict=True):
        assert torch.equal(bits(got[:end]), bits(expected[:end]))


def test_a_pair_stands_for_a_scaled_tensor() -> None:
    q = moekern.per_token_cast_to_fp8(torch.randn(6, 200))
    ids = torch.tensor([[0, 2], [2, 1], [1, 0], [0, 1], [2, 0], [1, 2]])
    one, other = moe_permute(q, ids, 3), moe_permute((q.data, q.scale), ids, 3)
    assert torch.equal(bits(one.x.data), bits(other.x.data)) and torch.equal(one.x.scale, other.x.scale)
    dequantized = moekern.dequantize(one.x)
    assert torch.equal(moe_unpermute(dequantized, one.inverse[:, :1]), moekern.dequantize(q))


# ---- the check itself --------------------------------------------------------------------------------


def test_the_bound_sees_one_wrong_slot() -> None:
    y, inverse, weights = routing_cases.unpermute_operands(Unpermute(9, 70, 4, 40, y="f32"))
    right = moe_unpermute.reference(y, inverse, weights).float()
    check_unpermute(right, y, inverse, weights)
    other = inverse.clone()
    other[5, 2] = (other[5, 2] + 1) % 40
    with pytest.raises(AssertionError, match=r"out\[5, "):
        check_unpermute(moe_unpermute.reference(y, other, weights).float(), y, inverse, weights)
