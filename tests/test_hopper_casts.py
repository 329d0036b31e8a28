"""The casts for Hopper: what they compute, by the checks that every kernel has to pass, and what they compiled to."""

from __future__ import annotations

import emulated
import hopper_cases
import hopper_code
import pytest
import test_casts
import test_kernels
from executors import Check, Executor, problems

import moekern
from moekern.scaled import DTYPES
from moekern.testing import cases

LISTS = [(op, [c for c in cases.CAST if c.op == op.name], test_kernels.test_cast) for op in test_kernels.CASTS]


@pytest.mark.parametrize(("executor", "check", "case"), problems(LISTS, emulated.executors))
def test_cases(executor: Executor, check: Check, case: cases.Cast) -> None:
    check(executor, case)


@hopper_cases.emulation
@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("format", DTYPES)
def test_every_value(format: str, dtype: str) -> None:
    test_casts.test_every_value_at_scale_one(hopper_cases.executor_of(moekern.per_token_cast_to_fp8), format, dtype)


@hopper_cases.emulation
@pytest.mark.parametrize("op", [moekern.per_token_cast_to_fp8, moekern.per_channel_cast_to_fp8], ids=lambda op: op.name)
def test_every_value_beside_a_larger_one(op: moekern.Op) -> None:
    test_casts.test_every_value_beside_a_larger_one(hopper_cases.executor_of(op), "e4m3fn", "bf16")


@hopper_cases.emulation
@pytest.mark.parametrize("layout", ["aligned", "rows"])
@pytest.mark.parametrize("x", cases.FLOATS)
@pytest.mark.parametrize("op", test_kernels.CASTS, ids=lambda op: op.name)
def test_aligned_rows_take_the_wide_kernels(op: moekern.Op, x: str, layout: str) -> None:
    case = cases.Cast(op.name, 3, 144, x=x, layout=layout, layout_out="aligned")
    test_kernels.test_cast(hopper_cases.executor_of(op), case)
    kernel = {"per_token": "cast_1x128", "per_block": "cast_128x128", "per_channel": "cast_128x1"}
    head = kernel.get(op.name.partition("_cast")[0], "silu_mul_cast")
    assert hopper_cases.launched() == f"{head}_{x if layout == 'aligned' else 'elements'}"


# ---- machine code

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
