"""The gate, permute and unpermute for Hopper: what they compute, by the checks that every kernel has to pass, and what
they compiled to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import emulated
import hopper_cases
import hopper_code
import pytest
import test_gate
import test_permute
import torch
from executors import Check, Executor, problems
from hopper_cases import executor_of

from moekern import moe_gate, moe_permute, moe_unpermute
from moekern.op import Op
from moekern.testing import routing_cases

LISTS: list[tuple[Op, Any, Check]] = [
    (moe_gate, routing_cases.GATE, test_gate.test_gate),
    (moe_permute, routing_cases.PERMUTE, test_permute.test_permute),
    (moe_unpermute, routing_cases.UNPERMUTE, test_permute.test_unpermute),
]
PROPERTIES: list[tuple[Op, Callable[[Executor], None]]] = [
    (moe_gate, test_gate.test_ties_go_to_the_lowest_index),
    (moe_gate, test_gate.test_zeros_of_both_signs_are_equal),
    (moe_gate, test_gate.test_the_mask_decides_where_selection_values_are_negative),
    (moe_gate, test_gate.test_weights_are_of_the_unbiased_scores),
    (moe_gate, test_gate.test_a_group_that_counts_as_nan_is_kept),
    (moe_gate, test_gate.test_an_expert_switched_off),
    (moe_gate, test_gate.test_a_row_does_not_depend_on_the_others),
    (moe_gate, test_gate.test_any_gate),
    (moe_permute, test_permute.test_any_permutation),
    (moe_permute, test_permute.test_there_and_back),
    (moe_permute, test_permute.test_one_slot_is_the_identity_for_every_value),
    (moe_permute, test_permute.test_permute_for_any_number_of_threads),
]


@pytest.mark.parametrize(("executor", "check", "case"), problems(LISTS, emulated.executors))
def test_cases(executor: Executor, check: Check, case: Any) -> None:
    check(executor, case)


@hopper_cases.emulation
@pytest.mark.parametrize(("op", "check"), [pytest.param(*p, id=p[1].__name__) for p in PROPERTIES])
def test_properties(op: Op, check: Callable[[Executor], None]) -> None:
    check(executor_of(op))


@hopper_cases.emulation
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_special_logits(value: float) -> None:
    test_gate.test_special_logits(executor_of(moe_gate), value)


@hopper_cases.emulation
@pytest.mark.parametrize("mapped", [False, True])
def test_ids_that_no_expert_has_count_as_none(mapped: bool) -> None:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 6, (40, 3), generator=g)
    none = torch.rand(ids.shape, generator=g) < 0.3
    options = {"alignment": 4, "expert_map": torch.tensor([3, -1, 0, 2, -1, 1]) if mapped else None}
    experts, x = 4 if mapped else 6, torch.randn(40, 64, generator=g)
    expected = moe_permute.reference(x, torch.where(none, -1, ids), experts, **options)
    changed = {"ids": torch.where(none, torch.tensor([-2, 6, 1 << 40])[ids % 3], ids)}
    if mapped:  # an entry of it that is no expert, for an expert that no id has
        changed["ids"] = torch.where(changed["ids"] == 1, 4, changed["ids"])
        changed["expert_map"] = torch.tensor([3, -1, 0, 2, 4, 1])
    got = hopper_cases.run_with(moe_permute, changed, x, ids, experts, **options)
    end = test_permute.end_of(expected.layout)
    assert torch.equal(got.inverse, expected.inverse)
    assert torch.equal(got.layout.counts, expected.layout.counts)
    assert torch.equal(got.layout.starts, expected.layout.starts)
    assert torch.equal(got.x[:end], expected.x[:end])


@hopper_cases.emulation
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_rows_that_are_none_are_left_out(index: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    y, weights = torch.randn(9, 64, generator=g), torch.rand(20, 3, generator=g)
    inverse = torch.randint(0, 9, (20, 3), generator=g).to(index)
    none = torch.rand(inverse.shape, generator=g) < 0.3
    wild = torch.where(none, torch.tensor([9, -5, torch.iinfo(index).max], dtype=index)[inverse % 3], inverse)
    got = hopper_cases.run_with(moe_unpermute, {"inverse": wild}, y, inverse, weights)
    assert torch.equal(got, moe_unpermute(y, torch.where(none, -1, inverse), weights))


@hopper_cases.emulation
@pytest.mark.parametrize("layout", ["aligned", "rows"])
@pytest.mark.parametrize("y", ["f32", "f16", "bf16"])
def test_aligned_rows_take_the_wide_kernels(y: str, layout: str) -> None:
    case = routing_cases.Unpermute(4, 72, 3, 20, y=y, layout=layout, layout_out="aligned")
    test_permute.test_unpermute(executor_of(moe_unpermute), case)
    assert hopper_cases.launched() == f"unpermute_{y if layout == 'aligned' else 'elements'}"


@hopper_cases.emulation
@pytest.mark.parametrize("layout", ["aligned", "rows"])
@pytest.mark.parametrize("x", ["f32", "f16", "bf16"])
def test_aligned_rows_are_cast_by_the_wide_kernels(x: str, layout: str) -> None:
    case = routing_cases.Permute(5, 144, 4, 2, x=x, format="e4m3fn", layout=layout, layout_out="aligned")
    test_permute.test_permute(executor_of(moe_permute), case)
    assert hopper_cases.launched() == f"permute_cast_{x if layout == 'aligned' else 'elements'}"


@hopper_cases.emulation
@pytest.mark.parametrize(("experts", "of_lane"), [(1, 1), (32, 1), (33, 2), (160, 8), (256, 8), (257, 16), (1024, 32)])
def test_a_lane_of_the_gate_has_as_few_experts_as_can_be(experts: int, of_lane: int) -> None:
    test_gate.test_gate(executor_of(moe_gate), routing_cases.Gate(3, experts, 1))
    assert hopper_cases.launched() == f"gate_{of_lane}"


# ---- machine code

_WARPS = {"gate": 4, "permute": 8, "permute_cast": 8, "permute_sort": 32, "unpermute": 8}
_KERNELS = {
    "gate": [f"gate_{experts}" for experts in (1, 2, 4, 8, 16, 32)],
    "permute": ["permute_rows"],
    "permute_cast": ["permute_cast_f32", "permute_cast_f16", "permute_cast_bf16", "permute_cast_elements"],
    "permute_sort": ["permute_sort"],
    "unpermute": ["unpermute_f32", "unpermute_f16", "unpermute_bf16", "unpermute_elements"],
}


def code_of(module: str, name: str) -> hopper_code.machine_code.MachineCode:
    return hopper_code.module(module, _WARPS[module])[name]


@pytest.mark.parametrize("module", _KERNELS)
def test_routing_stays_in_registers(module: str) -> None:
    codes = hopper_code.module(module, _WARPS[module])
    assert sorted(codes) == sorted(_KERNELS[module])
    for name, code in codes.items():
        assert hopper_code.stays_in_registers(code), name
        assert hopper_code.resident_blocks(code) >= 1, name


@pytest.mark.parametrize("name", _KERNELS["gate"])
def test_the_gate_takes_the_largest_of_a_warp_with_one_instruction(name: str) -> None:
    """And its loads are as wide as a lane's run of experts, up to 16 bytes."""
    code = code_of("gate", name)
    assert code.mnemonics["REDUX.MAX"] > 0
    widest = min(4 * int(name.removeprefix("gate_")), 16)
    assert max(hopper_code.accesses(code, "LDG")) == widest


def test_permute_moves_16_bytes_at_a_time() -> None:
    code = code_of("permute", "permute_rows")
    loads, stores = hopper_code.accesses(code, "LDG"), hopper_code.accesses(code, "STG")
    assert loads[16] == 4 and stores[16] >= 4
    assert hopper_code.bytes_in_flight(code, 4) >= hopper_code.IN_FLIGHT


@pytest.mark.parametrize(("x", "elements"), [("f32", 4), ("f16", 8), ("bf16", 8)])
def test_rows_are_loaded_and_cast_once_for_all_slots(x: str, elements: int) -> None:
    """A thread's 16 elements of a row, two codes an instruction and format, before the loop over the slots."""
    code = code_of("permute_cast", f"permute_cast_{x}")
    assert hopper_code.accesses(code, "LDG")[16] == 16 // elements
    assert hopper_code.bytes_in_flight(code, 16 // elements) >= hopper_code.IN_FLIGHT
    assert {elements, 4} >= set(hopper_code.accesses(code, "STG"))
    for format in ("E4M3", "E5M2"):
        assert sum(n for name, n in code.mnemonics.items() if name.startswith("F2FP") and format in name) == 8


def test_slots_are_ranked_with_one_match_each() -> None:
    code = code_of("permute_sort", "permute_sort")
    assert code.mnemonics["MATCH.ANY"] > 0
    assert not any(x.startswith(("ATOM", "RED.")) for x in code.mnemonics), "the order of atomics is not that of slots"


@pytest.mark.parametrize("name", ["unpermute_f32", "unpermute_f16", "unpermute_bf16"])
def test_unpermute_has_eight_rows_in_flight_and_fuses_nothing(name: str) -> None:
    code = code_of("unpermute", name)
    assert hopper_code.accesses(code, "LDG")[16] == 8
    assert hopper_code.bytes_in_flight(code, 8) >= hopper_code.IN_FLIGHT
    assert max(hopper_code.accesses(code, "STG")) == 16
    assert not any(x.startswith("FFMA") for x in code.mnemonics), "every product is rounded before it is added"
