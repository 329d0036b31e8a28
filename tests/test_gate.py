"""moe_gate: every kernel on every case against the float64 reference, ties, NaN, and what has to hold between calls."""

from __future__ import annotations

import itertools
import math
from typing import Any

import executors
import pytest
import torch
from hypothesis import example, given, note, settings
from hypothesis import strategies as st

import moekern
from moekern import Routing, moe_gate
from moekern.testing import cases, routing_cases
from moekern.testing.routing_cases import Gate
from moekern.testing.routing_numerics import check_gate

MOST = 0.5  # at least so many rows of random logits have ids that no rounding can change


def run(executor: executors.Executor, case: Gate) -> float:
    arguments, options = routing_cases.gate_operands(case)
    out = routing_cases.gate_output(case)
    executor(*arguments, **options, out=out)
    for name, view in (("weights", out.weights), ("ids", out.ids.view(torch.float32))):
        assert cases.only_written(view), f"wrote outside of out.{name}"
    return check_gate(out, *arguments, exact=case.exact, **options)


@executors.of(moe_gate)
@pytest.mark.parametrize("case", routing_cases.GATE, ids=str)
def test_gate(executor: executors.Executor, case: Gate) -> None:
    decided = run(executor, case)
    if case.values == "normal" and case.logits == "f32":
        assert decided >= MOST, f"only {decided:.0%} of the rows have ids that can be checked one by one"


def gate(executor: executors.Executor, logits: Any, topk: int, **options: Any) -> Routing:
    return executor(torch.as_tensor(logits), topk, **options) or pytest.fail("no result")


@executors.of(moe_gate)
def test_ties_go_to_the_lowest_index(executor: executors.Executor) -> None:
    """Equal scores within a vector, across vectors and blocks, and equal groups."""
    assert gate(executor, torch.zeros(2, 100), 20).ids.tolist() == [list(range(20))] * 2
    logits = torch.zeros(1, 100)
    logits[0, [97, 40, 41, 3]] = torch.tensor([1.0, 1.0, 2.0, 1.0])
    assert gate(executor, logits, 6).ids.tolist() == [[41, 3, 40, 97, 0, 1]]
    grouped = gate(executor, torch.zeros(1, 64), 20, num_expert_group=4, topk_group=2)
    assert grouped.ids.tolist() == [list(range(20))]
    bias = torch.zeros(64)
    bias[48:50] = 0.25  # 1/4 + 1/4 in the last group ties with 1/2 + 0 in the second
    bias[20] = 0.5
    grouped = gate(
        executor, torch.zeros(1, 64), 3, scoring="sigmoid", correction_bias=bias, num_expert_group=4, topk_group=2
    )
    assert grouped.ids.tolist() == [[20, 48, 49]]
    one = gate(
        executor, torch.zeros(1, 64), 3, scoring="sigmoid", correction_bias=bias, num_expert_group=4, topk_group=1
    )
    assert one.ids.tolist() == [[20, 16, 17]]


@executors.of(moe_gate)
def test_zeros_of_both_signs_are_equal(executor: executors.Executor) -> None:
    bias = torch.full((40,), -0.5)
    bias[7] = -0.5 - 2.0**-3
    got = gate(executor, torch.zeros(1, 40), 3, scoring="sigmoid", correction_bias=bias)
    assert got.ids.tolist() == [[0, 1, 2]]
    low = torch.full((1, 40), -200.0)  # scores of +0
    signed = torch.zeros(40)
    signed[::2] = -0.0
    assert gate(executor, low, 4, scoring="sigmoid", correction_bias=signed).ids.tolist() == [[0, 1, 2, 3]]


@executors.of(moe_gate)
def test_the_mask_decides_where_selection_values_are_negative(executor: executors.Executor) -> None:
    """-inf (DeepSeek's code) keeps to the chosen group; 0 (transformers) prefers what was masked."""
    bias = -torch.arange(1.0, 33.0)
    options = {"scoring": "sigmoid", "correction_bias": bias, "num_expert_group": 4, "topk_group": 1}
    assert gate(executor, torch.zeros(1, 32), 3, **options).ids.tolist() == [[0, 1, 2]]
    for zero in (0.0, -0.0):
        assert gate(executor, torch.zeros(1, 32), 3, mask_value=zero, **options).ids.tolist() == [[8, 9, 10]]
    cold = torch.full((1, 32), -200.0)  # scores of 0, as large as the mask
    options = {"scoring": "sigmoid", "num_expert_group": 4, "topk_group": 1}
    for zero in (0.0, -0.0):
        assert gate(executor, cold, 9, mask_value=zero, **options).ids.tolist() == [list(range(9))]


@executors.of(moe_gate)
def test_weights_are_of_the_unbiased_scores(executor: executors.Executor) -> None:
    bias = torch.zeros(16)
    bias[5] = 100.0
    got = gate(executor, torch.zeros(1, 16), 2, scoring="sigmoid", correction_bias=bias, routed_scaling_factor=4.0)
    assert got.ids.tolist() == [[5, 0]] and got.weights.tolist() == [[2.0, 2.0]]
    got = gate(executor, torch.zeros(1, 16), 4, scoring="softmax", renormalize=True, routed_scaling_factor=2.0)
    assert got.weights.tolist() == [[0.5] * 4]
    got = gate(executor, torch.full((1, 16), -300.0), 4, scoring="sigmoid", renormalize=True)
    assert got.weights.tolist() == [[0.0] * 4]  # 0 / 1e-20


@executors.of(moe_gate)
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_special_logits(executor: executors.Executor, value: float) -> None:
    """One special logit in a row of twenty, next to a row without any."""
    logits = torch.zeros(2, 20)
    logits[0, 13] = value
    got = gate(executor, logits, 4, scoring="sigmoid")
    first = [0, 1, 2, 3] if value == -torch.inf else [13, 0, 1, 2]
    assert got.ids.tolist() == [first, [0, 1, 2, 3]]
    assert got.weights[0].isnan().tolist() == [math.isnan(value), False, False, False]
    got = gate(executor, logits, 4)
    spoiled = value != -torch.inf
    assert got.ids.tolist() == [[0, 1, 2, 3]] * 2
    assert got.weights.isnan().tolist() == [[spoiled] * 4, [False] * 4]


@executors.of(moe_gate)
def test_a_group_that_counts_as_nan_is_kept(executor: executors.Executor) -> None:
    """Infinity and -infinity as a group's two best, and NaN as its best."""
    for first, rest in ((torch.inf, -torch.inf), (torch.nan, 0.0)):
        bias = torch.zeros(64)
        bias[32:48] = rest
        bias[40] = first
        got = gate(
            executor, torch.zeros(1, 64), 3, scoring="sigmoid", correction_bias=bias, num_expert_group=4, topk_group=1
        )
        assert got.ids.tolist() == [[40, 32, 33] if rest == 0 else [40, 0, 1]], first


@executors.of(moe_gate)
def test_an_expert_switched_off(executor: executors.Executor) -> None:
    """-inf as a logit or as a bias: a score of exactly 0, or the last choice."""
    logits = torch.zeros(1, 8)
    logits[0, :6] = -torch.inf
    got = gate(executor, logits, 4)
    assert got.ids.tolist() == [[6, 7, 0, 1]] and got.weights.tolist() == [[0.5, 0.5, 0.0, 0.0]]
    got = gate(executor, torch.zeros(1, 8), 3, scoring="sigmoid", correction_bias=logits[0])
    assert got.ids.tolist() == [[6, 7, 0]]


@executors.of(moe_gate)
def test_a_row_does_not_depend_on_the_others(executor: executors.Executor) -> None:
    """Rows are computed several at a time: alone, among others, and among rows of NaN."""
    case = Gate(23, 96, 6, scoring="sigmoid", bias="f32", groups=4, kept=2, renormalize=True)
    (logits, topk), options = routing_cases.gate_operands(case)
    together = gate(executor, logits, topk, **options)
    hostile = logits.clone()
    hostile[::2] = torch.nan
    among = gate(executor, hostile, topk, **options)
    for part in ("weights", "ids"):
        assert torch.equal(getattr(among, part)[1::2], getattr(together, part)[1::2])
    for i in range(case.tokens):
        alone = gate(executor, logits[i : i + 1], topk, **options)
        assert torch.equal(alone.weights[0], together.weights[i]) and torch.equal(alone.ids[0], together.ids[i])


@executors.of(moe_gate)
def test_for_any_number_of_threads(executor: executors.Executor) -> None:
    case = Gate(700, 256, 8, scoring="sigmoid", bias="f32", groups=8, kept=4, renormalize=True, factor=2.5)
    (logits, topk), options = routing_cases.gate_operands(case)
    results = []
    for threads in executor.threads:
        with moekern.use(num_threads=threads):
            results.append(gate(executor, logits, topk, **options))
    for result in results:
        assert torch.equal(result.weights, results[0].weights) and torch.equal(result.ids, results[0].ids)


def test_kernels_with_fma_give_the_same_bits() -> None:
    """Whatever the width of their vectors: routing is the same on every CPU that has FMA."""
    here = [e for e in executors.executors(moe_gate) if not e.absent and "cpu." in e.name]
    kernels = [e for e in here if not e.name.endswith("scalar")]
    for scoring, values in itertools.product(("softmax", "sigmoid"), ("normal", "wide")):
        case = Gate(64, 160, 6, scoring=scoring, bias="f32", groups=8, kept=3, values=values)
        (logits, topk), options = routing_cases.gate_operands(case)
        results = [kernel(logits, topk, **options) for kernel in kernels]
        for kernel, result in zip(kernels, results, strict=True):
            assert torch.equal(result.weights, results[0].weights), f"{kernel.name} differs from {kernels[0].name}"
            assert torch.equal(result.ids, results[0].ids), f"{kernel.name} differs from {kernels[0].name}"


# The gate of DeepSeek-V3's published inference code, on torch operators: written from its description.
def deepseek_gate(logits: torch.Tensor, bias: torch.Tensor, groups: int, kept: int, topk: int) -> set[int]:
    selection = logits.sigmoid() + bias
    grouped = selection.view(len(logits), groups, -1)
    best = grouped.topk(2, dim=-1).values.sum(-1).topk(kept, dim=-1).indices
    mask = torch.ones(len(logits), groups, dtype=torch.bool).scatter(1, best, False)
    return grouped.masked_fill(mask.unsqueeze(-1), -torch.inf).flatten(1).topk(topk, dim=-1).indices


def test_against_deepseek_on_torch() -> None:
    g = torch.Generator().manual_seed(1)
    logits, bias = torch.randn(200, 256, generator=g), torch.randn(256, generator=g) * 0.1
    got = moe_gate(
        logits, 8, scoring="sigmoid", correction_bias=bias, num_expert_group=8, topk_group=4, renormalize=True,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    theirs = deepseek_gate(logits, bias, 8, 4, 8)
    same = (got.ids.long().sort(1).values == theirs.sort(1).values).all(1)
    assert same.float().mean() > 0.98  # f32 decides the rest otherwise
    weights = logits.sigmoid().gather(1, theirs)
    weights = weights / weights.sum(1, keepdim=True) * 2.5
    torch.testing.assert_close(got.weights[same].sort(1).values, weights[same].sort(1).values, rtol=1e-6, atol=1e-7)


@st.composite
def gates(draw: st.DrawFn) -> Gate:
    size = draw(st.integers(1, 40))
    groups = draw(st.integers(1, min(12, 1024 // size)))
    bias = draw(st.sampled_from([None, "f32", "bf16"]))
    kept = draw(st.integers(1, groups))
    if bias and size == 1:
        kept = groups
    return Gate(
        tokens=draw(st.integers(0, 9)),
        experts=size * groups,
        topk=draw(st.integers(1, min(32, size * kept))),
        logits=draw(st.sampled_from(["f32", "f16", "bf16"])),
        scoring=draw(st.sampled_from(["softmax", "sigmoid"])),
        bias=bias,
        groups=groups,
        kept=kept,
        renormalize=draw(st.booleans()),
        factor=draw(st.sampled_from([1.0, 2.5, -1.0, 0.0])),
        mask=draw(st.sampled_from([-math.inf, 0.0])),
        layout=draw(st.sampled_from(["rows", "padded", "columns", "every_other"])),
        layout_out=draw(st.sampled_from(["rows", "padded", "columns"])),
        values=draw(st.sampled_from(["normal", "few", "equal", "wide", "negative", "nan", "infinite"])),
    )


@executors.of(moe_gate)
@settings(max_examples=80)
@given(case=gates())
@example(case=Gate(3, 1024, 32, groups=512, kept=16, bias="f32"))
def test_any_gate(executor: executors.Executor, case: Gate) -> None:
    if executor.absent:
        pytest.skip(f"{executor.name} {executor.absent}")
    note(str(case))
    run(executor, case)


def test_out_is_returned_and_written() -> None:
    logits = torch.randn(5, 16)
    out = Routing(torch.zeros(5, 3), torch.zeros(5, 3, dtype=torch.int32))
    got = moe_gate(logits, 3, out=out)
    assert got.weights is out.weights and got.ids is out.ids
    fresh = moe_gate(logits, 3)
    assert torch.equal(fresh.weights, out.weights) and torch.equal(fresh.ids, out.ids)
    weights, ids = moe_gate(logits, 3, out=(torch.zeros(5, 3), torch.zeros(5, 3, dtype=torch.int32)))
    assert torch.equal(weights, out.weights) and torch.equal(ids, out.ids)


# ---- the check itself --------------------------------------------------------------------------------


def swap(ids: torch.Tensor) -> None:
    ids[2, [0, 1]] = ids[2, [1, 0]]


def repeat(ids: torch.Tensor) -> None:
    ids[2, 0] = ids[2, 1]


def stray(ids: torch.Tensor) -> None:
    ids[2, 0] = 40


def worse(ids: torch.Tensor) -> None:
    unused = set(range(40)) - set(ids[2].tolist())
    ids[2, 2] = min(unused)


@pytest.mark.parametrize("spoil", [swap, repeat, stray, worse])
def test_the_check_sees_wrong_ids(spoil: Any) -> None:
    (logits, topk), options = routing_cases.gate_operands(Gate(5, 40, 3, bias="f32", scoring="sigmoid"))
    right = moe_gate.reference(logits, topk, **options)
    assert check_gate(right, logits, topk, **options) == 1.0
    spoil(right.ids)
    with pytest.raises(AssertionError, match=r"ids|expert"):
        check_gate(right, logits, topk, **options)


@pytest.mark.parametrize("factor", [1.0, 2.5])
@pytest.mark.parametrize("renormalize", [False, True])
def test_the_check_sees_a_weight(renormalize: bool, factor: float) -> None:
    case = Gate(5, 40, 3, bias="f32", renormalize=renormalize, factor=factor)
    (logits, topk), options = routing_cases.gate_operands(case)
    right = moe_gate.reference(logits, topk, **options)
    right.weights[3, 1] *= 1 + 1e-5
    with pytest.raises(AssertionError, match=r"weights\[3, 1\]"):
        check_gate(right, logits, topk, **options)
