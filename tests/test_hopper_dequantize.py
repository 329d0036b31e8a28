"""dequantize for Hopper, on the cases of every kernel of it, and what it compiled to."""

from __future__ import annotations

from typing import Any

import emulated
import hopper_code
import pytest
import test_kernels
from executors import Check, Executor, problems

import moekern
from moekern.testing import cases

_WARPS, _PIECES = 8, 4
_BYTES = {"f32": 4, "f16": 8, "bf16": 8}  # of codes that become 16 bytes of the result


@pytest.mark.parametrize(
    ("executor", "check", "case"),
    problems([(moekern.dequantize, cases.DEQUANTIZE, test_kernels.test_dequantize)], emulated.executors),
)
def test_dequantize(executor: Executor, check: Check, case: Any) -> None:
    check(executor, case)


@pytest.mark.parametrize("out", _BYTES)
def test_whole_pieces(out: str) -> None:
    """All of a thread's codes are asked for before one is used, and a result leaves in stores of 16 bytes."""
    code = hopper_code.module("dequantize", _WARPS)[f"dequantize_{out}"]
    assert hopper_code.stays_in_registers(code)
    assert hopper_code.resident_blocks(code) == hopper_code.THREADS // (32 * _WARPS)
    on_the_way = hopper_code.resident_blocks(code) * 32 * _WARPS * _PIECES * _BYTES[out]
    assert on_the_way >= hopper_code.IN_FLIGHT
    assert hopper_code.accesses(code, "STG")[16] == _PIECES * len(moekern.scaled.MAX), "once a format"
