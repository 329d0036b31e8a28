"""What an architecture has matrix units for, and how much a program may have of what is on the chip."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """backend, arch, warp_size: as Triton names them. native: FP8 formats that its matrix instructions take."""

    backend: str  # "cuda" | "hip"
    arch: int | str  # 90, "gfx942"
    warp_size: int
    shared_memory: int  # bytes that one program may have
    processors: int  # programs that run at once: streaming multiprocessors or compute units
    native: frozenset[str] = frozenset()
    macs: int = 1024  # multiply-adds of its matrix units in a cycle and processor, in FP8 if they take it
    product: str = ""  # the name of a device that is here, by which measured tiles are kept

    @property
    def name(self) -> str:
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)


_OCP = frozenset({"e4m3fn", "e5m2"})
# Shared memory of a block, and units: CUDA C++ Programming Guide (compute capabilities) and the data sheets of A100,
# L40S, H100 SXM, B200 and RTX 5090; AMD CDNA 3 and CDNA 4 ISA guides (LDS) and those of MI300X and MI355X.
_KNOWN = (
    Target("cuda", 80, 32, 163 * 1024, 108),
    Target("cuda", 89, 32, 99 * 1024, 142, _OCP, 1024),
    Target("cuda", 90, 32, 227 * 1024, 132, _OCP, 4096),
    Target("cuda", 100, 32, 227 * 1024, 148, _OCP, 8192),
    Target("cuda", 120, 32, 99 * 1024, 170, _OCP, 512),
    Target("hip", "gfx942", 64, 64 * 1024, 304, frozenset({"e4m3fnuz"}), 2048),
    Target("hip", "gfx950", 64, 160 * 1024, 256, _OCP, 4096),
)
TARGETS = {target.name: target for target in _KNOWN}


def macs(name: str) -> int:
    """Of an architecture by its exact name; of others a guess, which decides no more than how fast they are."""
    return TARGETS[name].macs if name in TARGETS else Target.macs


def native_formats(name: str) -> frozenset[str]:
    """Of an architecture by its exact name: of a relative of a known one nothing is assumed, its kernels decode."""
    return TARGETS[name].native if name in TARGETS else frozenset()
