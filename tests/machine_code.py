"""What a kernel that was compiled ahead of time consists of: registers, memory, instructions, its main loop.

Reads the disassembly of a cubin, and the assembly that the AMD backend writes. Needs no device, and Triton only for
its disassembler.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Rates:
    """What one multiprocessor or compute unit does in a cycle. fp8, half: multiply-adds of the matrix units, dense,
    summed in float32; 0: none. float32: lanes of the vector units."""

    device: str
    fp8: int
    half: int
    float32: int
    source: str


# A product's rate is a power of two a cycle; it follows from peak = 2 rate x multiprocessors x boost clock, as the
# sources give them. "derived": the quotient, rounded to that power. Lanes: CUDA programming guide, throughput of
# arithmetic instructions; AMD's CDNA3 and CDNA4 white papers, 128 float32 FMA a cycle, packed.
RATES = {
    "sm_80": Rates("A100 SXM", 0, 1024, 64, "A100 white paper: 1024 FP16 FMA a cycle"),
    "sm_89": Rates("L40S", 1024, 512, 128, "derived: data sheet 733 FP8, 362 FP16 TFLOP/s, 142 SMs, 2.52 GHz"),
    "sm_90": Rates("H100 SXM", 4096, 2048, 128, "derived: data sheet 1979 FP8, 989 FP16 TFLOP/s, 132 SMs, 1.83 GHz"),
    "sm_100": Rates("B200", 8192, 4096, 128, "derived: data sheet 4500 FP8, 2250 FP16 TFLOP/s, 148 SMs, 1.85 GHz"),
    "sm_120": Rates("RTX 5090", 512, 256, 128, "derived: white paper 419 FP8, 210 FP16 TFLOP/s, 170 SMs, 2.41 GHz"),
    "gfx942": Rates("MI300X", 2048, 1024, 128, "derived: data sheet 2614.9 FP8, 1307.4 FP16 TFLOP/s, 304 CUs, 2.1 GHz"),
    "gfx950": Rates("MI355X", 4096, 2048, 128, "derived: data sheet 5033 FP8, 2516 FP16 TFLOP/s, 256 CUs, 2.4 GHz"),
}
SCHEDULERS = 4  # of a multiprocessor, a warp instruction a cycle each; a compute unit's SIMDs
_VECTOR_CYCLES = 4  # that a wave of 64 keeps a SIMD of 16 lanes
RESERVED_SHARED = 1024  # bytes of each block, from sm_90 on, outside what it may have

_Classes = tuple[tuple[str, re.Pattern[str]], ...]
CLASSES = ("matrix", "global", "shared", "local", "conversion", "float", "synchronisation", "other")
_NVIDIA: _Classes = (
    ("matrix", re.compile(r"(UTC)?[A-Z]G?MMA\b")),
    ("global", re.compile(r"(LDG|LDGSTS|STG|LD|ST|RED|REDG|ATOM|ATOMG|UTMA\w+|UBLK\w+)\b")),
    ("shared", re.compile(r"(LDS|LDSM|STS|STSM|ATOMS|LDTM|STTM|UTCCP)\b")),  # LDTM, STTM: tensor memory
    ("local", re.compile(r"(LDL|STL)\b")),
    ("conversion", re.compile(r"U?(F2F|F2FP|F2I|F2IP|I2F|I2FP|I2I|FRND)\b|HADD2\.F32\b")),
    ("float", re.compile(r"U?(FMUL|FFMA|FADD|FMUL2|FFMA2|FADD2|HMUL2|HFMA2|HADD2)\b")),
    (
        "synchronisation",
        re.compile(
            r"(BAR|SYNCS|WARPGROUP|DEPBAR|LDGDEPBAR|WARPSYNC|MEMBAR|FENCE|UTCBAR|ARRIVES|NANOSLEEP|ELECT|"
            r"UCGABAR_\w+|ERRBAR|ACQBULK|CCTL)\b"
        ),
    ),
)
_AMD: _Classes = (
    ("matrix", re.compile(r"v_(mfma|smfmac|wmma|swmmac)_")),
    ("global", re.compile(r"(buffer|global|flat|tbuffer|s_buffer)_")),
    ("shared", re.compile(r"ds_")),
    ("local", re.compile(r"scratch_")),
    ("conversion", re.compile(r"v_cvt_")),
    ("float", re.compile(r"v_(pk_)?(mul|fma|fmac|fmaak|fmamk|mac|mad|add|sub|subrev)_(legacy_)?f(16|32)")),
    ("synchronisation", re.compile(r"s_(barrier|wait|sleep|setprio|sched)")),
)
_STORES_TO_LOCAL = re.compile(r"STL\b")


@dataclass(frozen=True)
class Instruction:
    """mnemonic: with modifiers. target: index of the instruction that it may go on with. next: whether it may fall
    through to the one behind it."""

    mnemonic: str
    operands: str = ""
    target: int | None = None
    next: bool = True


@dataclass(frozen=True)
class MachineCode:
    """A compiled kernel. Counts are of instructions as they lie in memory, for one warp or wave."""

    target: str
    warps: int
    registers: int  # of a thread: vector registers, accumulation registers included
    scalar_registers: int
    spills: int  # NVIDIA: instructions that store to local memory. AMD: registers that the compiler moved there
    scalar_spills: int  # AMD: scalar registers that went to lanes of vector registers
    local_bytes: int  # of a thread: the stack frame, or scratch
    shared_bytes: int  # of a block
    tensor_memory: int  # columns
    mnemonics: Counter[str]
    loop: Counter[str] = field(default_factory=Counter)  # the main loop, see main_loop
    loops: tuple[Counter[str], ...] = ()  # all of the loops that have matrix instructions and hold no other such loop

    @property
    def matrix(self) -> list[str]:
        """The matrix instructions in it."""
        return sorted(name for name in self.mnemonics if class_of(name) == "matrix")

    @property
    def specialised(self) -> bool:
        """Whether warps run different loops; `warps` counts all of them then."""
        return any(name.startswith("USETMAXREG") for name in self.mnemonics)

    def mix(self) -> Counter[str]:
        """Instructions of the main loop by class."""
        return mix(self.loop)

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "loops": list(self.loops)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> MachineCode:
        counters = {name: Counter(values[name]) for name in ("mnemonics", "loop")}
        return cls(**{**values, **counters, "loops": tuple(map(Counter, values["loops"]))})


def class_of(mnemonic: str) -> str:
    for name, pattern in _AMD if mnemonic[0].islower() else _NVIDIA:
        if pattern.match(mnemonic):
            return name
    return "other"


def mix(mnemonics: Mapping[str, int]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for mnemonic, count in mnemonics.items():
        counts[class_of(mnemonic)] += count
    return counts


# ---- loops


def matrix_loops(code: list[Instruction]) -> list[Counter[str]]:
    """The loops that have matrix instructions and hold no other loop that has, in the order in which they lie.

    Loops without any, such as those that wait for a barrier, are part of the loop around them.
    """
    matrix = {i for i, instruction in enumerate(code) if class_of(instruction.mnemonic) == "matrix"}
    bodies = [body for body in _loops(code) if body & matrix]
    innermost = [body for body in bodies if not any(other < body for other in bodies)]
    return [Counter(code[i].mnemonic for i in body) for body in sorted(innermost, key=min)]


def main_loop(loops: Iterable[Counter[str]]) -> Counter[str]:
    """The one with the most matrix instructions; the first of several."""
    return max(loops, key=lambda loop: mix(loop)["matrix"], default=Counter())


def _loops(code: list[Instruction]) -> list[frozenset[int]]:
    """Natural loops as sets of indices: what reaches a branch back without passing the loop's first instruction."""
    starts = {0} | {x.target for x in code if x.target is not None}
    starts |= {i + 1 for i, x in enumerate(code) if (x.target is not None or not x.next) and i + 1 < len(code)}
    heads = sorted(starts)
    number = {head: i for i, head in enumerate(heads)}
    ends = [*heads[1:], len(code)]
    after: list[list[int]] = []
    for end in ends:
        last = code[end - 1]
        following = [] if last.target is None else [number[last.target]]
        if last.next and end < len(code):
            following.append(number[end])
        after.append(following)
    before: list[list[int]] = [[] for _ in heads]
    for block, following in enumerate(after):
        for other in following:
            before[other].append(block)
    bodies: dict[int, set[int]] = {}
    for tail, head in _edges_back(after):
        body, left = bodies.setdefault(head, {head}), [tail]
        while left:
            block = left.pop()
            if block not in body:
                body.add(block)
                left.extend(before[block])
    return [frozenset(i for block in body for i in range(heads[block], ends[block])) for body in bodies.values()]


def _edges_back(after: list[list[int]]) -> list[tuple[int, int]]:
    """Edges to a block on the way to their own. Blocks that only indirect branches reach are entered too."""
    found, seen, on_the_way = [], set(), set()
    for start in range(len(after)):
        if start in seen:
            continue
        seen.add(start)
        on_the_way.add(start)
        way = [(start, iter(after[start]))]
        while way:
            block, left = way[-1]
            for other in left:
                if other in on_the_way:
                    found.append((block, other))
                elif other not in seen:
                    seen.add(other)
                    on_the_way.add(other)
                    way.append((other, iter(after[other])))
                    break
            else:
                on_the_way.discard(block)
                way.pop()
    return found


def _resolved(lines: list[tuple[str, str, str | None, bool]], labels: Mapping[str, int]) -> list[Instruction]:
    def target(label: str | None) -> int | None:
        at = labels.get(label) if label is not None else None
        return at if at is not None and at < len(lines) else None

    return [Instruction(mnemonic, operands, target(label), next) for mnemonic, operands, label, next in lines]


# ---- NVIDIA

_SASS = re.compile(
    r"\s*/\*[0-9a-f]+\*/\s+(?P<predicate>@!?U?P[T\d]+\s+)?(?P<mnemonic>[A-Z][\w.]*)\s*(?P<operands>[^;]*);"
)
_SASS_LABEL = re.compile(r"(\.?[\w$]+):\s*$")
_SASS_TARGET = re.compile(r"`\((\.?[\w$]+)\)")


def parse_sass(text: str) -> list[Instruction]:
    """Of `nvdisasm -c`."""
    lines: list[tuple[str, str, str | None, bool]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _SASS_LABEL.match(line):
            labels[label[1]] = len(lines)
        elif found := _SASS.match(line):
            mnemonic, operands = found["mnemonic"], found["operands"].strip()
            name = mnemonic.partition(".")[0]
            goes = _SASS_TARGET.search(operands) if name in ("BRA", "JMP") else None
            # BRA has predicates among its operands too: `BRA !P0, label`, `BRA.U UP0, label`
            always = found["predicate"] is None and (goes is None or operands.startswith("`"))
            next = not (always and name in ("BRA", "JMP", "EXIT", "RET", "BRX", "KILL"))
            lines.append((mnemonic, operands, goes[1] if goes else None, next))
    return _resolved(lines, labels)


def _tools() -> Path:
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin"


def _run(tool: str, *arguments: str) -> str:
    # cuobjdump looks for nvdisasm in PATH
    environment = {**os.environ, "PATH": f"{_tools()}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = [str(_tools() / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def disassemble(cubin: bytes) -> tuple[str, str]:
    """SASS, and the resources that it takes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return _run("nvdisasm", "-c", str(path)), _run("cuobjdump", "-res-usage", str(path))


def from_sass(
    target: str, sass: str, resources: str, warps: int, shared: int = 0, tensor_memory: int = 0
) -> MachineCode:
    """shared: what is asked for at launch, beside what the code reserves itself."""
    code = parse_sass(sass)
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", resources)}
    static = used["SHARED"] - (RESERVED_SHARED if int(target.removeprefix("sm_")) >= 90 else 0)
    mnemonics = Counter(x.mnemonic for x in code)
    loops = matrix_loops(code)
    return MachineCode(
        target,
        warps,
        registers=used["REG"],
        scalar_registers=0,
        spills=sum(count for name, count in mnemonics.items() if _STORES_TO_LOCAL.match(name)),
        scalar_spills=0,
        local_bytes=used["STACK"] + used["LOCAL"],
        shared_bytes=shared + max(static, 0),
        tensor_memory=tensor_memory,
        mnemonics=mnemonics,
        loop=main_loop(loops),
        loops=tuple(loops),
    )


_SASS_KERNEL = re.compile(r"^\s*\.section\s+\.text\.(\w+)", re.MULTILINE)
_KERNEL_RESOURCES = re.compile(r"Function (\w+):\s*(.*)")


def of_module(cubin: bytes, target: str, warps: int) -> dict[str, MachineCode]:
    """Of every kernel of a module, by its name."""
    sass, resources = disassemble(cubin)
    parts = _SASS_KERNEL.split(sass)[1:]
    used = dict(_KERNEL_RESOURCES.findall(resources))
    return {
        name: from_sass(target, text, used[name], warps) for name, text in zip(parts[::2], parts[1::2], strict=True)
    }


# ---- AMD

_AMD_LINE = re.compile(r"\s+(?P<mnemonic>(s|v|ds|buffer|tbuffer|global|flat|scratch)_\w+)\s*(?P<operands>[^;]*)")
_AMD_LABEL = re.compile(r"(\.?[\w$]+):")


def parse_amdgcn(text: str) -> list[Instruction]:
    lines: list[tuple[str, str, str | None, bool]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _AMD_LABEL.match(line):
            labels[label[1]] = len(lines)
        elif found := _AMD_LINE.match(line):
            mnemonic, operands = found["mnemonic"], found["operands"].strip()
            goes = operands if mnemonic.startswith(("s_cbranch", "s_branch")) else None
            lines.append((mnemonic, operands, goes, not mnemonic.startswith(("s_branch", "s_endpgm", "s_setpc"))))
    return _resolved(lines, labels)


def from_amdgcn(target: str, text: str, warps: int, shared: int = 0) -> MachineCode:
    """shared: what is asked for at launch, beside what the code reserves itself."""

    def said(name: str) -> int:
        found = re.search(rf"^\s+\.{name}:\s+(\d+)", text, re.MULTILINE)
        return int(found[1]) if found else 0

    code = parse_amdgcn(text)
    loops = matrix_loops(code)
    return MachineCode(
        target,
        warps,
        registers=said("vgpr_count"),  # where registers are one file, .agpr_count is among them
        scalar_registers=said("sgpr_count"),
        spills=said("vgpr_spill_count"),
        scalar_spills=said("sgpr_spill_count"),
        local_bytes=said("private_segment_fixed_size"),
        shared_bytes=shared + said("group_segment_fixed_size"),
        tensor_memory=0,
        mnemonics=Counter(x.mnemonic for x in code),
        loop=main_loop(loops),
        loops=tuple(loops),
    )


def analyse(kernel: Any) -> MachineCode:
    """Of Triton's CompiledKernel."""
    metadata = kernel.metadata
    if "cubin" in kernel.asm:
        sass, resources = disassemble(kernel.asm["cubin"])
        memory = getattr(metadata, "tmem_size", 0)
        return from_sass(f"sm_{metadata.target.arch}", sass, resources, metadata.num_warps, metadata.shared, memory)
    return from_amdgcn(metadata.target.arch, kernel.asm["amdgcn"], metadata.num_warps, metadata.shared)


# ---- shares of the matrix units

_FP8 = re.compile(r"(UTC)?QG?MMA\b|v_\w*(fp8|bf8|f8f6f4)")
_NVIDIA_SHAPE = re.compile(r"[A-Z](?P<group>G?)MMA\.(?:SP\.)?(?:(?P<m>64)x(?P<n>\d+)x(?P<k>\d+)|(?P<packed>168\d+))\b")
_AMD_SHAPE = re.compile(r"v_\w+?_(\d+)x(\d+)x(\d+)")


def multiply_adds(mnemonic: str) -> float:
    """Of one matrix instruction, for one warp or wave. Those of tensor memory have their shape in a descriptor: nan."""
    if found := _AMD_SHAPE.match(mnemonic):
        return math.prod(map(int, found.groups()))
    if found := _NVIDIA_SHAPE.match(mnemonic):
        if found["packed"]:  # 16816: 16 x 8 x 16
            return 16 * 8 * int(found["packed"].removeprefix("168"))
        return math.prod(int(found[name]) for name in "mnk") / 4  # four warps do it together
    return math.nan


def loop_multiply_adds(code: MachineCode) -> float:
    """Of all warps, in an iteration of the main loop; nan where instructions do not say."""
    matrix = [name for name in code.loop if class_of(name) == "matrix"]
    return sum(code.loop[name] * multiply_adds(name) for name in matrix) * code.warps


@dataclass(frozen=True)
class Share:
    """Of the matrix units' time, if nothing waits for memory. Cycles are those of one block's iteration, alone.

    overlapped: other warps' instructions are issued meanwhile; alone: they are not.
    """

    matrix_cycles: float
    other_cycles: float

    @property
    def overlapped(self) -> float:
        return self.matrix_cycles / max(self.matrix_cycles, self.other_cycles)

    @property
    def alone(self) -> float:
        return self.matrix_cycles / (self.matrix_cycles + self.other_cycles)


def share(code: MachineCode, tile: int | None = None, warps: int | None = None) -> Share | None:
    """tile: multiply-adds of a block's iteration, where instructions do not say. warps: of each of the loops of
    specialised warps, which are added up. None without a main loop, or where one of the two is missing."""
    if code.specialised and warps is None:
        return None
    loop = sum(code.loops, Counter[str]()) if code.specialised else code.loop
    warps = warps if code.specialised and warps is not None else code.warps
    rates = RATES[code.target]
    matrix = {name: count for name, count in loop.items() if class_of(name) == "matrix"}
    if not matrix:
        return None
    work = sum(count * multiply_adds(name) for name, count in matrix.items()) * warps
    if math.isnan(work):
        if tile is None:
            return None
        work = tile
    rate = rates.fp8 if all(_FP8.match(name) for name in matrix) else rates.half
    counts = mix(loop)
    if code.target.startswith("sm_"):
        issue = (sum(loop.values()) - counts["matrix"]) * warps / SCHEDULERS
        other = max(issue, counts["float"] * warps * 32 / rates.float32)
    else:  # scalar, memory and LDS instructions of other waves go beside a vector instruction
        vector = sum(count for name, count in loop.items() if name.startswith("v_") and name not in matrix)
        other = vector * _VECTOR_CYCLES * warps / SCHEDULERS
    return Share(work / rate, other)
