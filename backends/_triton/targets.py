"""What an architecture has matrix units for. Backends make one of what they probe; nothing is inferred from a name."""

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

    @property
    def name(self) -> str:
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)


_OCP = frozenset({"e4m3fn", "e5m2"})
# Shared memory of a block: CUDA programming guide, table of compute capabilities; AMD CDNA3 and CDNA4 ISA guides (LDS).
SM_80 = Target("cuda", 80, 32, 163 * 1024, 108)
SM_89 = Target("cuda", 89, 32, 99 * 1024, 142, _OCP)
SM_90 = Target("cuda", 90, 32, 227 * 1024, 132, _OCP)
SM_100 = Target("cuda", 100, 32, 227 * 1024, 148, _OCP)
SM_120 = Target("cuda", 120, 32, 99 * 1024, 170, _OCP)
GFX942 = Target("hip", "gfx942", 64, 64 * 1024, 304, frozenset({"e4m3fnuz"}))
GFX950 = Target("hip", "gfx950", 64, 160 * 1024, 256, _OCP)
TARGETS = {target.name: target for target in (SM_80, SM_89, SM_90, SM_100, SM_120, GFX942, GFX950)}
