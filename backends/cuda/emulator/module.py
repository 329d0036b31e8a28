"""PTX text as a module whose kernels can be launched."""

from __future__ import annotations

import ctypes
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moekern.backends.cuda.emulator import arrays, driver
from moekern.backends.cuda.emulator.driver import Fault
from moekern.backends.cuda.emulator.tensor_maps import TensorMap

_DYNAMIC_SHARED_BYTES, _NON_PORTABLE_CLUSTER = 8, 14  # CUfunction_attribute
_CLUSTER = 4  # CUlaunchAttributeID
_FLOATS = {"f32": "<f", "f64": "<d", "f16": "<e"}


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str  # "u64", "b8", ...
    offset: int
    bytes: int


@dataclass(frozen=True)
class Kernel:
    """What the PTX says of a kernel. `registers` are 32-bit registers that PTX names: ptxas needs far fewer."""

    name: str
    parameters: tuple[Parameter, ...]
    threads: int  # of a CTA, at most; 0 where the PTX sets no limit
    registers: int
    shared_bytes: int  # static
    local_bytes: int  # of a thread
    instructions: int
    unknown: tuple[str, ...]  # opcodes that cannot be executed


@dataclass(frozen=True)
class Statistics:
    """Of a launch. Instructions are those of warps; products are wgmma of a warpgroup."""

    kernel: str
    seconds: float
    instructions: int
    turns: int
    products: int
    bulk_copies: int
    bulk_bytes: int
    opcodes: dict[str, int] = field(repr=False)


class _Cluster(ctypes.Structure):
    _fields_ = (
        ("id", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("size", ctypes.c_uint * 3),
        ("room", ctypes.c_char * 52),
    )


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Cluster)), ("count", ctypes.c_uint),
    )  # fmt: skip


def _three(sizes: int | Sequence[int], what: str) -> tuple[int, int, int]:
    all_sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    if not 1 <= len(all_sizes) <= 3 or any(n < 1 for n in all_sizes):
        raise ValueError(f"{what} is {sizes}: one to three positive sizes were expected")
    x, y, z = (*all_sizes, 1, 1)[:3]
    return x, y, z


class Module:
    """Kernels of a PTX text. Raises Fault, with the line, if the text cannot be read."""

    def __init__(self, ptx: str | bytes) -> None:
        text = ptx.encode() if isinstance(ptx, str) else ptx
        self._driver = driver.library()
        self._module = ctypes.c_void_p()
        driver.check(self._driver.cuModuleLoadData(ctypes.byref(self._module), text))

    def __del__(self) -> None:
        if getattr(self, "_module", None):
            self._driver.cuModuleUnload(self._module)

    def kernels(self) -> dict[str, Kernel]:
        described = self._driver.moekern_emulator_describe(self._module)
        if described is None:
            raise Fault(self._driver.moekern_emulator_fault().decode())
        found = {}
        for row in json.loads(described):
            row["parameters"] = tuple(Parameter(**p) for p in row["parameters"])
            row["unknown"] = tuple(row["unknown"])
            found[row["name"]] = Kernel(**row)
        return found

    def launch(
        self,
        kernel: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        arguments: Sequence[Any] = (),
        *,
        cluster: int | Sequence[int] | None = None,
        shared_bytes: int = 0,
        schedule: str = "round_robin",
        seed: int = 0,
        races: bool = True,
        poison: bool = True,
        sms: int = 8,
        accumulation: str = "exact",
        patience: int = 5_000_000,
        memory: Sequence[Any] = (),
        unchecked: bool = False,
    ) -> Statistics:
        """Runs a kernel to its end. Raises Fault if it does anything wrong.

        arguments: one for each parameter. An array or tensor stands for its address; the kernel may touch the array's
        own bytes, and write to them unless the array is read-only. A TensorMap or bytes are passed as they are, and
        what the map describes may be touched. Numbers are converted to the parameter's type, which for .b32 and .b64 is
        that of the number: a float is a float32 or a float64. memory: arrays whose addresses are in other arrays.
        schedule: "round_robin", "random", "producer_greedy" or "consumer_greedy". accumulation: "exact" or "hopper".
        unchecked: nothing is out of bounds; a wrong address ends the process.
        """
        function = ctypes.c_void_p()
        driver.check(self._driver.cuModuleGetFunction(ctypes.byref(function), self._module, kernel.encode()))
        parameters = self.kernels()[kernel].parameters
        if len(arguments) != len(parameters):
            raise ValueError(f"{kernel} has {len(parameters)} parameters, {len(arguments)} arguments were given")
        allowed = [arrays.memory_of(x) for x in memory]
        values = [_packed(p, x, allowed) for p, x in zip(parameters, arguments, strict=True)]
        buffers = [ctypes.create_string_buffer(v, len(v)) for v in values]
        pointers = (ctypes.c_void_p * len(buffers))(*map(ctypes.addressof, buffers))
        config = _Config(_uints(_three(grid, "grid")), _uints(_three(block, "block")), shared_bytes, None, None, 0)
        if cluster is not None:
            attribute = _Cluster(_CLUSTER, 0, _uints(_three(cluster, "cluster")))
            config.attributes, config.count = ctypes.pointer(attribute), 1
        settings = {
            "schedule": schedule, "seed": seed, "races": races, "poison": poison, "sms": sms,
            "accumulation": accumulation, "patience": patience, "strict": not unchecked,
        }  # fmt: skip
        with driver.configured(settings, [] if unchecked else allowed) as library:
            driver.check(library.cuFuncSetAttribute(function, _DYNAMIC_SHARED_BYTES, shared_bytes))
            driver.check(library.cuFuncSetAttribute(function, _NON_PORTABLE_CLUSTER, 1))
            driver.check(library.cuLaunchKernelEx(ctypes.byref(config), function, pointers, None))
            return Statistics(**json.loads(library.moekern_emulator_statistics()))


def _uints(sizes: tuple[int, int, int]) -> Any:
    return (ctypes.c_uint * 3)(*sizes)


def _packed(p: Parameter, x: Any, allowed: list[tuple[int, int, bool]]) -> bytes:
    if isinstance(x, TensorMap):
        allowed.append(x.memory)
        x = x.words
    elif arrays.is_array(x) and getattr(x, "shape", None) != ():
        allowed.append(arrays.memory_of(x))
        x = allowed[-1][0]
    if isinstance(x, bytes):
        if len(x) != p.bytes:
            raise ValueError(f"{p.name} has {p.bytes} bytes, {len(x)} were given")
        return x
    if p.bytes > 8:
        raise ValueError(f"{p.name} is a struct of {p.bytes} bytes: bytes were expected, not {type(x).__name__}")
    if p.type in _FLOATS:
        return struct.pack(_FLOATS[p.type], float(x))
    if isinstance(x, float):
        if p.bytes < 4:
            raise ValueError(f"{p.name} has the type {p.type}: an integer was expected, not {x}")
        return struct.pack("<f" if p.bytes == 4 else "<d", x)
    value = int(x)
    if not -(1 << (8 * p.bytes - 1)) <= value < 1 << (8 * p.bytes):
        raise ValueError(f"{p.name} has {p.bytes} bytes: {value} does not fit")
    return (value & ((1 << (8 * p.bytes)) - 1)).to_bytes(p.bytes, "little")
