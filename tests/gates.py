"""What the machine code of a kernel has to have, and must not."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from machine_code import MachineCode, class_of, loop_multiply_adds

# Every matrix instruction of a kernel has to be of these. A compiler that lacks a unit, or thinks that it does, decodes
# FP8 itself and says nothing.
FP8 = {
    "sm_89": r"QMMA\.16832\.F32\.E[45]M[32]\.E[45]M[32]$",
    "sm_90": r"QGMMA\.64x\d+x32\.F32\.E[45]M[32]\.E[45]M[32]$",
    "sm_100": r"UTCQMMA",
    "sm_120": r"QMMA\.16832\.F32\.E[45]M[32]\.E[45]M[32]$",
    "gfx942": r"v_mfma_f32_(32x32x16|16x16x32)_(fp8|bf8)_(fp8|bf8)$",
    "gfx950": r"v_mfma_f32_(32x32x64|16x16x128)_f8f6f4$",  # the others have half its rate
}
# Outside the main loop, where it may be any of the target's, whatever its rate.
SLOW_FP8 = {"gfx950": r"v_mfma_f32_\w+_(f8f6f4|fp8_fp8|fp8_bf8|bf8_fp8|bf8_bf8)$"}
HALF = {
    "sm_80": r"HMMA\.16816\.F32(\.BF16)?$",
    "sm_89": r"HMMA\.16816\.F32(\.BF16)?$",
    "sm_90": r"HGMMA\.64x\d+x16\.F32(\.BF16)?$",
    "sm_100": r"UTCHMMA",
    "sm_120": r"HMMA\.16816\.F32(\.BF16)?$",
    "gfx942": r"v_mfma_f32_(32x32x8|16x16x16)_b?f16$",
    "gfx950": r"v_mfma_f32_(32x32x16|16x16x32)_b?f16$",
}


@dataclass(frozen=True)
class Expectation:
    """matrix: what the main loop's matrix instructions match, of which there is one at least; "": the kernel has none.
    elsewhere: what those outside the main loop match, if it is something else. required, forbidden: one instruction at
    least, or none, matches. spills, local_bytes: at most, outside the main loop. tile: multiply-adds of a block's step.
    """

    shared_memory: int
    matrix: str = ""
    elsewhere: str = ""
    required: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()
    spills: int = 0
    local_bytes: int = 0
    tile: int | None = None


def problems(code: MachineCode, expected: Expectation) -> list[str]:
    return list(_problems(code, expected))


def _problems(code: MachineCode, expected: Expectation) -> Iterator[str]:
    if expected.matrix:
        if not code.matrix:
            yield f"has no matrix instruction {expected.matrix}"
        elif not any(class_of(name) == "matrix" for name in code.loop):
            yield "has no loop around its matrix instructions"
        for name in code.matrix:
            wanted = expected.matrix if name in code.loop else expected.elsewhere or expected.matrix
            if not re.match(wanted, name):
                yield f"has {name}, which is not {wanted}"
        # a backend that fails in its last steps may drop instructions, and only print
        steps = loop_multiply_adds(code) / expected.tile if expected.tile and not code.specialised else 1.0
        if code.loop and not (steps >= 1 and steps.is_integer()) and not math.isnan(steps):
            yield f"multiplies {steps:g} tiles in its main loop"
    elif code.matrix:
        yield f"has {', '.join(code.matrix)}, and was to have no matrix instruction"
    for pattern in expected.required:
        if not any(re.match(pattern, name) for name in code.mnemonics):
            yield f"has no {pattern}"
    for pattern in expected.forbidden:
        if found := sorted(name for name in code.mnemonics if re.match(pattern, name)):
            yield f"has {', '.join(found)}"
    if code.spills > expected.spills:
        yield f"spills {code.spills} registers, of {code.registers}; {expected.spills} are allowed"
    if code.local_bytes > expected.local_bytes:
        yield f"has {code.local_bytes} bytes of local memory a thread; {expected.local_bytes} are allowed"
    if local := code.mix()["local"]:
        yield f"has {local} accesses to local memory in its main loop"
    # scalar registers are spilled to lanes of vector registers, which costs time only where it is done often
    if moves := sum(count for name, count in code.loop.items() if re.match(r"v_(read|write)lane", name)):
        yield f"has {moves} moves of spilled scalar registers in its main loop"
    if code.shared_bytes > expected.shared_memory:
        yield f"has {code.shared_bytes} bytes of shared memory; the target has {expected.shared_memory}"
