"""The gate, permute and unpermute for Hopper: what they compiled to.

What they compute, test_gate and test_permute ask of every kernel.
"""

from __future__ import annotations

import hopper_code
import pytest

_WARPS = {"gate": 4, "permute": 8, "permute_sort": 32, "unpermute": 8}
_KERNELS = {
    "gate": [f"gate_{experts}" for experts in (1, 2, 4, 8, 16, 32)],
    "permute": ["permute_rows"],
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
