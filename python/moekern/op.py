"""The dispatcher: an Op is a contract, a Kernel is one way to honour it.

A call goes ops/<family>.py (spec) -> Op.__call__ here -> csrc/bindings/ -> backends/<device>/.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from moekern.scaled import ScaledTensor

log = logging.getLogger("moekern")


@dataclass(frozen=True)
class Device:
    """What the hardware can do. Built once per device by its backend's `probe()`."""

    kind: str  # "cpu" | "cuda" | "rocm" | "npu"
    arch: str  # "x86_64" | "sm_90" | "gfx942" | "ascend910b"
    features: frozenset[str] = frozenset()
    index: int = 0
    name: str = ""
    without: tuple[tuple[str, str], ...] = ()  # a feature that software would give it, and why that is not here


@dataclass(frozen=True)
class Kernel:
    """One implementation of one op: same parameters as the spec, output already allocated."""

    name: str  # "cpu.avx2_stream"
    run: Callable[..., None]
    kind: str  # the Device.kind it runs on
    needs: frozenset[str] = frozenset()  # Device.features it cannot do without
    refuses: Callable[..., str | None] | None = None  # (call) -> a reason in plain words, or None to accept
    for_few_rows: bool = False  # depends on the number of rows: left out when batch_invariant is asked for
    workspace: Callable[..., int] | None = None  # (call) -> bytes of the caller's workspace that it takes

    def lacks(self, device: Device) -> str | None:
        if device.kind != self.kind:
            return f"runs on {self.kind}, not {device.kind}"
        if missing := self.needs - device.features:
            reasons = [why for feature, why in device.without if feature in missing]
            return "; ".join([f"needs {', '.join(sorted(missing))}", *reasons])
        return None

    def absent(self, devices: list[Device]) -> str | None:
        """Why none of these devices can run this kernel, or None."""
        reasons = [self.lacks(device) for device in devices if device.kind == self.kind]
        return None if None in reasons else reasons[0] if reasons else f"no {self.kind} device"

    def why_not(self, device: Device, *args: Any) -> str | None:
        """Why this kernel cannot take this call, or None."""
        return self.lacks(device) or (self.refuses(*args) if self.refuses else None)


class NotSupported(NotImplementedError):
    """No kernel takes the call; the message lists every kernel with its reason."""


@dataclass(frozen=True)
class Policy:
    """What `moekern.use` and the environment ask for."""

    backend: str | None = None
    kernels: tuple[tuple[str, str], ...] = ()  # (op, kernel name)
    batch_invariant: bool = False
    num_threads: int | None = None

    def forced(self, op: str) -> str | None:
        return dict(self.kernels).get(op)


policy = Policy()  # replaced as a whole by moekern.use


class Op:
    """A spec (signature, docstring, float64 reference) and the kernels that meet it, best first.

    The order of `kernels` is the selection policy. `prepare` validates, brings operands to their
    canonical form and allocates the output, once; it returns the spec's parameters in order.
    """

    def __init__(self, spec: Callable[..., Any], prepare: Callable[..., tuple[Any, ...]], output: str) -> None:
        functools.update_wrapper(self, spec)
        self.name: str = spec.__name__
        self.reference = spec
        self.prepare = prepare
        self.traced: Callable[..., Any] = self._untraceable  # the torch.library form, set by library.py
        self.params = tuple(inspect.signature(spec).parameters)
        self.kernels: list[Kernel] = []
        self.output_index = self.params.index(output)
        self._usable: dict[torch.device, tuple[Policy, list[Kernel]]] = {}  # candidates, by the output's device

    def _untraceable(self, *args: Any, **kwargs: Any) -> Any:
        raise NotSupported(f"{self.name} has no torch.library form: plain tensors, no gradients, no compiler")

    def add(self, kernel: Kernel) -> None:
        """Append a kernel: worse than those before it, better than those after."""
        try:
            got = tuple(inspect.signature(kernel.run).parameters)
        except ValueError:  # a native function has no signature; csrc/bindings/ fixes its arity
            got = self.params
        if got != self.params:
            raise TypeError(f"{kernel.name}: parameters {got}, but {self.name} has {self.params}")
        if any(k.name == kernel.name for k in self.kernels):
            raise ValueError(f"{self.name} already has a kernel named {kernel.name}")
        self.kernels.append(kernel)
        self._usable.clear()

    def candidates(self, device: Device, policy: Policy) -> list[Kernel]:
        """The kernels that this device and the policy allow, best first."""
        if forced := policy.forced(self.name):
            found = [k for k in self.kernels if k.name == forced]
            if not found:
                names = ", ".join(k.name for k in self.kernels)
                raise ValueError(f"{self.name} has no kernel named {forced!r}; it has {names}")
            if reason := found[0].lacks(device):
                raise NotSupported(f"{self.name}: forced kernel {forced} {reason}")
        else:
            found = [k for k in self.kernels if k.lacks(device) is None]
            if policy.batch_invariant:
                found = [k for k in found if not k.for_few_rows]
        if policy.backend not in (None, device.kind):
            raise NotSupported(f"{self.name}: backend {policy.backend} is forced; the operands are on {device.kind}")
        log.debug("%s on %s: %s", self.name, device.arch, [k.name for k in found])
        return found

    def select(self, device: Device, *call: Any) -> Kernel:
        """The kernel that takes a prepared call on `device`, which need not be this machine's."""
        if kernel := _first(self.candidates(device, policy), call):
            return kernel
        raise NotSupported(self.explain(device, *call))

    def explain(self, device: Device, *args: Any) -> str:
        """Which kernel takes a prepared call, and why each better one does not."""
        allowed = {k.name for k in self.candidates(device, policy)}
        lines, chosen = [], None
        for kernel in self.kernels:
            reason = kernel.why_not(device, *args)
            if reason is None and kernel.name not in allowed:
                reason = "left out by moekern.use or the environment"
            if reason is None and chosen is None:
                chosen, reason = kernel.name, "chosen"
            lines.append(f"  {kernel.name}: {reason or 'would do'}")
        head = f"{self.name} on {device.kind} ({device.arch}): {chosen or 'no kernel'}"
        return "\n".join([head, *lines])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.traced(*args, **kwargs)
        grad = torch.is_grad_enabled()
        if not _eager(args, grad) or (kwargs and not _eager(kwargs.values(), grad)):
            return self.traced(*args, **kwargs)
        call = self.prepare(*args, **kwargs)
        out = call[self.output_index]
        where = location(out)
        usable = self._usable.get(where)
        if usable is None or usable[0] is not policy:
            now = policy
            usable = self._usable[where] = (now, self.candidates(device_of(out), now))
        if (kernel := _first(usable[1], call)) is None:
            raise NotSupported(self.explain(device_of(out), *call))
        kernel.run(*call)
        return out


def _first(kernels: list[Kernel], call: tuple[Any, ...]) -> Kernel | None:
    for kernel in kernels:
        if kernel.refuses is None or kernel.refuses(*call) is None:
            return kernel
    return None


def op(*, prepare: Callable[..., tuple[Any, ...]], output: str = "out") -> Callable[[Callable[..., Any]], Op]:
    return lambda spec: Op(spec, prepare, output)


def _eager(operands: Iterable[Any], grad: bool) -> bool:
    """Whether C++ may read the operands as they are: no gradient to record, no fake or other subclass."""
    for x in operands:
        kind = type(x)
        if kind is ScaledTensor:
            x = x.data
            kind = type(x)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            if grad and x.requires_grad:
                return False
        elif isinstance(x, tuple):
            if not _eager(x, grad):
                return False
        elif isinstance(x, torch.Tensor):
            return False
    return True


_devices: dict[torch.device, Device] = {}


def register_device(where: torch.device, device: Device) -> None:
    """Called by backends.load() for every device that a backend's probe() found."""
    _devices[where] = device


Output = Any  # a tensor, a ScaledTensor, or a NamedTuple that begins with one of them


def location(output: Output) -> torch.device:
    if isinstance(output, tuple):
        output = output[0]
    return output.data.device if isinstance(output, ScaledTensor) else output.device


def device_of(operand: Output) -> Device:
    where = location(operand)
    try:
        return _devices[where]
    except KeyError:
        raise NotSupported(f"no backend has found device {where}; see `python -m moekern info`") from None
