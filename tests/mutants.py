"""Every kernel of ours with one instruction wrong: what a test of kernels has to notice.

A mutant lacks one barrier's wait or arrival, one fence or one commit, or has one number changed: bytes that a barrier
expects, arrivals that it counts, an operand's descriptor, coordinates of a copy, the address of a scale. Instructions
are found by what they are (ptx_text.py), and a mutant's name counts those of its kind in its kernel.

Not among them, since the emulator could not notice: a warp's own synchronisation, as it executes the lanes of a warp
together, and griddepcontrol, as it executes one launch after another. Nor reads that change nothing but an estimate: of
the scales by which `repaired` (scales.cuh) decides whether a sum may have overflowed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ptx_text import Statement, statements


@dataclass(frozen=True)
class Mutant:
    kernel: str
    change: str  # "no mbarrier.try_wait", "wgmma.a.stride", ...
    number: int  # of its kind in the kernel
    start: int
    end: int
    instead: str

    def __str__(self) -> str:
        return f"{self.kernel}: {self.change} #{self.number}"

    def apply(self, text: str) -> str:
        return text[: self.start] + self.instead + text[self.end :]


# ---- what can be left out. Of a wait that says whether it has succeeded, it always has.

_LEFT_OUT = re.compile(
    r"bar(rier)?(\.cta)?\.(sync|arrive|red)|barrier\.cluster\.(arrive|wait)|fence\.|membar|"
    r"mbarrier\.arrive|cp\.async\.mbarrier\.arrive|cp\.async\.(bulk\.)?(commit_group|wait_group|wait_all)|"
    r"wgmma\.(fence|commit_group|wait_group)"
)
_ASKS = re.compile(r"mbarrier\.(try_wait|test_wait)")
_MODIFIERS = re.compile(r"\.(shared::\w+|aligned|b64|u32|parity)\b")


def _short(opcode: str) -> str:
    return _MODIFIERS.sub("", opcode)


def _left_out(s: Statement) -> Iterator[tuple[str, str]]:
    if _LEFT_OUT.match(s.opcode):
        yield f"no {_short(s.opcode)}", ";"
    if _ASKS.match(s.opcode):
        yield f"no {_short(s.opcode)}", f"setp.eq.u32 {s.operands[0].split('|')[0]}, 0, 0;"


# ---- numbers that can be changed


def _plus(s: Statement, index: int, value: str, addend: int, kind: str = "s32") -> str:
    """The statement with `addend` added to `value`, which is or lies in its operand `index`."""
    if re.fullmatch(r"-?\d+", value):
        changed, before, after = str(int(value) + addend), "", ""
    else:
        bits = "b64" if kind.endswith("64") else "b32"
        changed, before, after = "mutant", f"{{ .reg .{bits} mutant; add.{kind} mutant, {value}, {addend}; ", " }"
    operands = list(s.operands)
    operands[index] = re.sub(rf"(?<![\w%$]){re.escape(value)}(?![\w$])", changed, operands[index], count=1)
    return before + s.text(operands=tuple(operands)) + after


def _counts(s: Statement) -> Iterator[tuple[str, str]]:
    if s.opcode.startswith("mbarrier.init"):
        yield "mbarrier.init.count", _plus(s, 1, s.operands[1], 1)
    if s.opcode.startswith(("mbarrier.arrive.expect_tx", "mbarrier.expect_tx")):
        yield "expect_tx.bytes", _plus(s, len(s.operands) - 1, s.operands[-1], 16)


# Words of a descriptor: 16 bytes on; eight rows 16 bytes further apart; another swizzle.
_DESCRIPTOR = {"address": 1, "stride": 1 << 32, "swizzle": 1 << 62}


def _descriptors(s: Statement) -> Iterator[tuple[str, str]]:
    if s.opcode.startswith("wgmma.mma_async"):
        for index, name in ((1, "a"), (2, "b")):
            if not s.operands[index].startswith("{"):
                for field, addend in _DESCRIPTOR.items():
                    yield f"wgmma.{name}.{field}", _plus(s, index, s.operands[index], addend, "s64")


_TENSOR = re.compile(r"\[\s*[^,\]]+,\s*\{(?P<coordinates>[^}]*)\}\s*\]")


def _copies(s: Statement) -> Iterator[tuple[str, str]]:
    if s.opcode.startswith("cp.async.bulk.tensor"):
        way = "store" if ".global.shared" in s.opcode else "multicast" if "multicast" in s.opcode else "load"
        for index, operand in enumerate(s.operands):
            if found := _TENSOR.fullmatch(operand):
                for number, coordinate in enumerate(found["coordinates"].split(",")):
                    yield f"tma.{way}.{'xyzvw'[number]}", _coordinate(s, index, operand, number, coordinate.strip())
            elif operand.startswith("[") and index == 0 and way != "store":
                yield f"tma.{way}.to", _plus(s, index, _base(operand), 128)
        if way == "store":
            yield f"tma.{way}.from", _plus(s, 1, _base(s.operands[1]), 128)
    if re.match(r"cp\.async\.c[ag]\.shared\.global", s.opcode):
        yield "cp.async.from", _plus(s, 1, _base(s.operands[1]), 4, "s64")
        yield "cp.async.to", _plus(s, 0, _base(s.operands[0]), 4)


def _coordinate(s: Statement, index: int, operand: str, number: int, value: str) -> str:
    """Coordinates may be the same register twice: this one alone changes."""
    head, coordinates, tail = re.split(r"[{}]", operand)
    parts = [part.strip() for part in coordinates.split(",")]
    parts[number] = "mutant"
    operands = (*s.operands[:index], f"{head}{{{', '.join(parts)}}}{tail}", *s.operands[index + 1 :])
    return f"{{ .reg .b32 mutant; add.s32 mutant, {value}, 1; {s.text(operands=operands)} }}"


def _base(operand: str) -> str:
    return re.split(r"[+\s]", operand.strip("[] "), maxsplit=1)[0]


def _scales(s: Statement) -> Iterator[tuple[str, str]]:
    """Loads of single floats: all that kernels read so are scales, weights of experts and staged results."""
    if re.match(r"ld\.shared(::\w+)?\.f32", s.opcode):
        yield "ld.shared.f32.address", _plus(s, 1, _base(s.operands[1]), 4)
    if re.match(r"ld\.global(\.nc)?(\.\w+)*\.f32", s.opcode) and not s.operands[0].startswith("{"):
        yield "ld.global.f32.address", _plus(s, 1, _base(s.operands[1]), 4, "s64")


_CHANGES: tuple[Callable[[Statement], Iterator[tuple[str, str]]], ...] = (
    _left_out, _counts, _descriptors, _copies, _scales,
)  # fmt: skip


def _estimated(every: list[Statement]) -> set[int]:
    """Where floats are loaded of which only how large their product is counts: x, then |(double)x * (double)y|."""
    wide = {(s.kernel, s.operands[1]): s.operands[0] for s in every if s.opcode == "cvt.f64.f32"}
    product = {(s.kernel, operand): s.operands[0] for s in every if s.opcode == "mul.f64" for operand in s.operands[1:]}
    sizes = {(s.kernel, s.operands[1]) for s in every if s.opcode == "abs.f64"}
    loads = [s for s in every if s.opcode.startswith("ld.") and s.parts[-1] == "f32"]
    return {
        s.start
        for s in loads
        if (s.kernel, product.get((s.kernel, wide.get((s.kernel, s.operands[0]), "")), "")) in sizes
    }


def mutants(text: str) -> Iterator[Mutant]:
    """Of all kernels in it."""
    seen: Counter[tuple[str, str]] = Counter()
    every = list(statements(text))
    estimated = _estimated(every)
    for s in (s for s in every if s.start not in estimated):
        for changes in _CHANGES:
            for change, instead in changes(s):
                seen[s.kernel, change] += 1
                yield Mutant(s.kernel, change, seen[s.kernel, change], s.start, s.end, instead)
