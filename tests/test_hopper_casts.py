"""The casts for Hopper: what they compiled to. What they compute, test_kernels and test_casts ask of every kernel."""

from __future__ import annotations

import hopper_code
import pytest

_WARPS = 8
_INPUTS = {"f32": 4, "f16": 2, "bf16": 2}  # bytes of an element
_PIECE = 16
# 16-byte loads of a thread before the first use of one, by the elements that it keeps
_LOADS = {
    f"{cast}_{x}": elements * size // _PIECE
    for cast, elements in (("cast_1x128", 16), ("cast_128x128", 64), ("cast_128x1", 64), ("silu_mul_cast", 32))
    for x, size in _INPUTS.items()
}


def code_of(name: str) -> hopper_code.machine_code.MachineCode:
    return hopper_code.module("silu_mul_cast" if name.startswith("silu") else "cast", _WARPS)[name]


def test_all_casts_are_there() -> None:
    names = set(hopper_code.module("cast", _WARPS)) | set(hopper_code.module("silu_mul_cast", _WARPS))
    casts = ("cast_1x128", "cast_128x128", "cast_128x1", "silu_mul_cast")
    assert names == {*_LOADS, *(f"{cast}_elements" for cast in casts)}


@pytest.mark.parametrize("name", [*_LOADS, "cast_1x128_elements", "cast_128x128_elements", "cast_128x1_elements"])
def test_casts_stay_in_registers(name: str) -> None:
    assert hopper_code.stays_in_registers(code_of(name))


@pytest.mark.parametrize("name", _LOADS)
def test_casts_load_16_bytes_and_enough_of_them_at_a_time(name: str) -> None:
    code = code_of(name)
    assert hopper_code.accesses(code, "LDG") == {_PIECE: _LOADS[name]}
    assert hopper_code.bytes_in_flight(code, _LOADS[name]) >= hopper_code.IN_FLIGHT
    elements = _PIECE // _INPUTS[name.rsplit("_", 1)[1]]
    stores = hopper_code.accesses(code, "STG")
    assert set(stores) <= {elements, 4}, "codes of a piece leave together, scales one by one"


@pytest.mark.parametrize("name", _LOADS)
def test_the_hardware_rounds_to_its_formats(name: str) -> None:
    """For e4m3fn and e5m2, two elements an instruction; e4m3fnuz, which it does not have, takes integers."""
    kept = _LOADS[name] * _PIECE // _INPUTS[name.rsplit("_", 1)[1]] // (2 if name.startswith("silu") else 1)
    for format in ("E4M3", "E5M2"):
        used = {x: n for x, n in code_of(name).mnemonics.items() if x.startswith("F2FP") and format in x}
        assert sum(used.values()) == kept // 2 and all("SATFINITE" in x for x in used), used
