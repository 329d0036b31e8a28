"""No instruction outside its ISA file: what runs before the CPU's features are known runs on every CPU.

Looks at the objects that CMake has built (editable installs keep them in build/).
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import moekern

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.skipif(shutil.which("objdump") is None or shutil.which("nm") is None, reason="needs binutils"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="knows x86-64's instructions only"),
]
# VEX and EVEX mnemonics begin with v; verr and verw are older, and no compiler writes them.
BEYOND_BASELINE = re.compile(r"v(?!err|erw)|tile|ldtile|sttile|tdp")
WIDE_REGISTER = re.compile(r"%[yzt]mm\d|%k[0-7]\b")


def objects() -> list[Path]:
    """The newest build's objects of _C. The emulator, a library of its own, has clones that are chosen at run time."""
    for build in sorted(ROOT.glob("build/cp*"), key=lambda path: path.stat().st_mtime, reverse=True):
        if found := sorted(path for path in build.rglob("*.cpp.o") if "moekern_emulator.dir" not in path.parts):
            return found
    pytest.skip("no build directory (installed from a wheel)")


def isa_of(path: Path) -> str:
    """ "" for what is compiled without ISA flags."""
    match = re.search(r"moekern_cpu_(\w+)\.dir", str(path))
    return "" if match is None or match[1] == "scalar" else match[1]


def instructions(path: Path) -> Iterator[tuple[str, str]]:
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=True
    ).stdout
    for line in listing.splitlines():
        _, tab, text = line.partition(":\t")
        if tab and text.strip():
            mnemonic, _, operands = text.strip().partition(" ")
            yield mnemonic, operands


def leaks(path: Path) -> list[str]:
    return [
        f"{mnemonic} {operands.strip()}"
        for mnemonic, operands in instructions(path)
        if BEYOND_BASELINE.match(mnemonic) or WIDE_REGISTER.search(operands)
    ]


def symbols(path: Path) -> Iterator[tuple[str, str]]:
    listing = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
    for line in listing.splitlines():
        kind, _, name = line[17:].partition(" ")
        yield kind, name


def test_drivers_use_the_baseline_only() -> None:
    drivers = [path for path in objects() if not isa_of(path)]
    assert len(drivers) >= 7, drivers
    for path in drivers:
        assert not (found := leaks(path)), f"{path.name} holds {len(found)} instructions such as {found[:3]}"


def test_isa_objects_are_recognised() -> None:
    """The check can fail: every ISA object holds what it forbids."""
    isas = [path for path in objects() if isa_of(path)]
    assert {isa_of(path) for path in isas} >= {"avx2", "avx512"}
    for path in isas:
        assert leaks(path), f"{path} has no vector instruction"


def test_isa_objects_share_no_code() -> None:
    """What an ISA object defines for others is data of its own name.

    A weak symbol could be the copy that the linker keeps for everyone, a function one that somebody calls.
    """
    for path in objects():
        isa = isa_of(path)
        if not isa:
            continue
        defined = list(symbols(path))
        weak = [name for kind, name in defined if kind in "WVuvw"]
        assert not weak, f"{path.name} defines or takes weak symbols: {weak[:5]}"
        assert not (functions := [name for kind, name in defined if kind == "T"]), f"{path.name}: {functions[:5]}"
        tables = [name for kind, name in defined if kind in "DBRGS"]
        assert tables and all(re.fullmatch(rf"moekern::cpu::k_(\w+_)?{isa}", name) for name in tables), (
            f"{path.name}: {tables}"
        )


def test_the_build_is_the_one_imported() -> None:
    """What was looked at is what runs: every kernel that _C lists has its object."""
    isas = {isa_of(path) or "scalar" for path in objects()}
    names = {
        kernel.name.removeprefix("cpu.").removesuffix("_stream")
        for kernel in moekern.fp8_gemm_nt.kernels
        if kernel.kind == "cpu"
    }
    assert names <= isas
