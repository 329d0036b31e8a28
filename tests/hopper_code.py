"""The machine code of the kernels for Hopper that _C has, and what an SM of one has room for."""

from __future__ import annotations

import functools
import re

import machine_code
import pytest

from moekern import _C

# Of an SM: CUDA programming guide, technical specifications of compute capability 9.0.
REGISTERS, THREADS, BLOCKS, SHARED = 64 << 10, 2048, 32, 228 << 10
_REGISTERS_TOGETHER = 8  # of a thread are given out so many at once
# What has to be on its way: 3.35 TB/s (data sheet) / 132 SMs x 1 us from a load to its data, more than is published.
IN_FLIGHT = 25 << 10


@functools.cache
def module(name: str, warps: int) -> dict[str, machine_code.MachineCode]:
    """Of the kernels of kernels/<name>.cu."""
    pytest.importorskip("triton")  # for its disassembler
    backend = _C.native.get("cuda")
    if backend is None:
        pytest.skip("_C is built without kernels for CUDA")
    return machine_code.of_module(backend["modules"]()[name][0], "sm_90", warps)


def resident_blocks(code: machine_code.MachineCode) -> int:
    """Of an SM, by its registers, threads and shared memory."""
    threads = 32 * code.warps
    registers = -(-code.registers // _REGISTERS_TOGETHER) * _REGISTERS_TOGETHER * threads
    shared = code.shared_bytes + machine_code.RESERVED_SHARED
    return min(REGISTERS // registers, THREADS // threads, BLOCKS, SHARED // shared)


def accesses(code: machine_code.MachineCode, what: str) -> dict[int, int]:
    """{bytes of an access: how many} of instructions LDG or STG."""
    counts: dict[int, int] = {}
    for mnemonic, count in code.mnemonics.items():
        if mnemonic.split(".")[0] == what:
            width = re.search(r"\.(?:[US](8|16)|(64|128))\b", mnemonic)
            size = int(width[1] or width[2]) // 8 if width else 4
            counts[size] = counts.get(size, 0) + count
    return counts


def bytes_in_flight(code: machine_code.MachineCode, loads: int) -> int:
    """That an SM's threads have asked for, when each has issued so many loads of 16 bytes."""
    return resident_blocks(code) * 32 * code.warps * loads * 16


def stays_in_registers(code: machine_code.MachineCode) -> bool:
    return code.spills == 0 and code.local_bytes == 0 and not any(x.startswith(("LDL", "STL")) for x in code.mnemonics)
