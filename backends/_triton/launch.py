"""One launch of a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moekern.backends._triton.targets import Target

_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
    torch.float8_e4m3fnuz: "*fp8e4b8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_ALIGNED = 16  # bytes of an address, or elements of a size, that the compiler may count on


@dataclass(frozen=True)
class Launch:
    """arguments: tensors, integers and floats, in the kernel's order; constants: what it is compiled for."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    fp_fusion: bool = True  # whether a product and a sum may be rounded once

    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": self.fp_fusion}

    def run(self) -> None:
        """On the device of its tensors; in the interpreter on the CPU if TRITON_INTERPRET was set before the import."""
        if all(self.grid):
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options())

    def compile(self, target: Target) -> Any:
        """Ahead of time, for a device that need not be here: Triton's CompiledKernel."""
        signature, attributes = {}, {}
        constants = dict(self.constants)
        for i, (name, value) in enumerate(self.arguments.items()):
            if value is None:
                constants[name] = None
                signature[name] = "constexpr"
            elif isinstance(value, torch.Tensor):
                signature[name] = _POINTERS[value.dtype]
                attributes[(i,)] = [["tt.divisibility", _ALIGNED]]  # what torch allocates is
            elif isinstance(value, int) and value == 1:
                constants[name] = 1
                signature[name] = "constexpr"
            else:
                signature[name] = "i32" if isinstance(value, int) else "fp32"
                if isinstance(value, int) and value % _ALIGNED == 0:
                    attributes[(i,)] = [["tt.divisibility", _ALIGNED]]
        signature |= dict.fromkeys(self.constants, "constexpr")
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)
        device = GPUTarget(target.backend, target.arch, target.warp_size)
        return triton.compile(source, target=device, options=self.options())


def strides(name: str, x: torch.Tensor) -> dict[str, int]:
    return {f"{name}_row": x.stride(0), f"{name}_column": x.stride(1)}
