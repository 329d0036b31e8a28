"""One launch of a kernel.

Triton's own way, `kernel[grid](...)`, binds arguments by name and writes options and specialisation into a string, and
takes the longer the more arguments a kernel has. With a driver that does nothing, for gemm_kernel's 29 arguments and 25
constants, on one Zen 4 core (`bench/overheads.py`), it takes 27 us. `Launch.run` takes 9.5: 4 for Triton's function
that says what an argument is specialised by, 1.4 to find what was compiled, 0.7 to put arguments in order. The plan
before it takes 12, most of it for two dictionaries.

`Launch.run` keeps, for every kernel, what was compiled for which specialisation, and asks Triton only for new ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime._allocation import _allocator
from triton.runtime.driver import driver

from moekern.backends._triton.ahead import Absent, active
from moekern.backends._triton.targets import Target

try:  # internals, which may move; without them Triton launches in its own way
    from triton._C.libtriton import native_specialize_impl as _specialise
    from triton.compiler import CompiledKernel, make_backend
    from triton.runtime import JITFunction
except ImportError:
    _specialise = None


@dataclass(slots=True)  # not frozen: each field of it would take 0.1 us
class Launch:
    """arguments: tensors, integers and floats; constants: what the kernel is compiled for. Together all it takes."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    fp_fusion: bool = True  # whether a product and a sum may be rounded once

    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": self.fp_fusion}

    def run(self, stream: int | None = None) -> None:
        """On the device of its tensors; in the interpreter on the CPU if TRITON_INTERPRET was set before the import.

        stream: the handle of the one to run on, for operands of a library with a current stream of its own. None:
        torch's current one, which is the one that a graph is captured from. Nothing waits for anything.
        """
        if not all(self.grid):
            return
        if self.constants.get("TILES"):
            _provide_memory()
        forms = _forms(self.kernel)
        if forms is None:
            return self.by_triton(stream)
        device = driver.active.get_current_device()
        where = self._device()
        if where == device or where < 0:
            return forms.launch(self, device, stream)
        with torch.cuda.device(where):
            forms.launch(self, where, stream)

    def by_triton(self, stream: int | None = None) -> None:
        """As `run`, in Triton's way."""
        on = torch.cuda.stream(torch.cuda.ExternalStream(stream)) if stream is not None else contextlib.nullcontext()
        with on:
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options())

    def _device(self) -> int:
        """Of the first tensor; negative for the CPU's."""
        for value in self.arguments.values():
            if isinstance(value, torch.Tensor):
                return value.get_device()
        return -1

    def compile(self, target: Target) -> Any:
        """Ahead of time, for a device that need not be here: Triton's CompiledKernel, which its cache keeps on disk.

        The key there is that of a launch on such a device. Until it returns, no thread may launch anything.
        """
        with active(Absent(target)):
            return self.prepare()

    def prepare(self) -> Any:
        """Compiles for the current device, or finds what was compiled, without launching."""
        values = {**self.arguments, **self.constants}
        order = [values.pop(name) for name in self.kernel.arg_names]
        if values:
            raise TypeError(f"{self.kernel.__name__} has no arguments {', '.join(values)}")
        return self.kernel.warmup(*order, grid=self.grid, **self.options())


def _provide_memory() -> None:
    """Tensor descriptors lie in memory that Triton asks for at the launch: torch's, unless the program provides any."""
    if type(_allocator.get()).__name__ == "NullAllocator":
        triton.set_allocator(_memory)


def _memory(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Freed as soon as the launch is queued: whoever has it next uses it behind the kernel on the same stream."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


class _Forms:
    """What one kernel was compiled to, by what Triton compiles anew for: the types of arguments, whether integers are 1
    or multiples of 16, whether addresses are; constants, options and knobs; the device.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        constants = [kernel.arg_names[i] for i in kernel.constexprs]
        arguments = [name for name in kernel.arg_names if name not in constants]
        self._arguments, self._constants = _picker(arguments), _picker(constants)
        order = [*arguments, *constants]
        # mostly constants come last: then the two, one after the other, are what the kernel takes
        self._order = None if order == kernel.arg_names else _picker([order.index(name) for name in kernel.arg_names])
        self._found: dict[Any, Any] = {}
        self._backends: dict[Any, Any] = {}

    def launch(self, launch: Launch, device: Any, stream: int | None) -> None:
        arguments, constants = self._arguments(launch.arguments), self._constants(launch.constants)
        backend = self._backends.get(device) or self._backend(device)
        key = (
            device, launch.num_warps, launch.num_stages, launch.fp_fusion, *_settings(), constants,
            *[_specialise(backend, value, False, True, True) for value in arguments],
        )  # fmt: skip
        compiled = self._found.get(key)
        if compiled is None:
            compiled = launch.prepare()
            if not isinstance(compiled, CompiledKernel):  # a hook of Triton's, or a mode, has it compiled elsewhere
                return launch.by_triton(stream)
            self._found[key] = compiled
        values = arguments + constants
        if self._order is not None:
            values = self._order(values)
        if stream is None:
            stream = driver.active.get_current_stream(device)
        x, y, z, *_ = *launch.grid, 1, 1
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        said = None if enter is None else compiled.launch_metadata((x, y, z), stream, *values)
        compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, said, enter, leave, *values)

    def _backend(self, device: Any) -> Any:
        backend = self._backends[device] = make_backend(driver.active.get_current_target())
        return backend


def _picker(keys: list[Any]) -> Callable[[Any], tuple[Any, ...]]:
    return itemgetter(*keys) if len(keys) > 1 else lambda values: tuple(values[key] for key in keys)


def _settings() -> tuple[Any, ...]:
    """What else Triton compiles anew for."""
    return knobs.runtime.debug, knobs.compilation.instrumentation_mode


_kept: dict[int, _Forms | None] = {}  # by the id of a kernel: its hash is that of its source


def _forms(kernel: Any) -> _Forms | None:
    """None: Triton has to launch it."""
    try:
        forms = _kept[id(kernel)]
    except KeyError:
        forms = _kept[id(kernel)] = _Forms(kernel) if _is_plain(kernel) else None
    if forms is not None and (kernel.pre_run_hooks or getattr(knobs.runtime, "add_stages_inspection_hook", None)):
        return None
    return forms


def _is_plain(kernel: Any) -> bool:
    """Compiled, and specialised for every argument by its value alone."""
    if _specialise is None or not isinstance(kernel, JITFunction):
        return False
    return not any(
        param.do_not_specialize or param.do_not_specialize_on_alignment or (param.annotation and not param.is_constexpr)
        for param in kernel.params
    )


def strides(name: str, x: torch.Tensor) -> dict[str, int]:
    return {f"{name}_row": x.stride(0), f"{name}_column": x.stride(1)}


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up. Triton's own, which kernels may call too, takes 2 us."""
    return -(-x // y)
