"""Choosing kernels by hand: moekern.use, moekern.explain, and the environment."""

from __future__ import annotations

import os
from dataclasses import replace
from types import TracebackType
from typing import Any

from moekern import op as dispatcher
from moekern import runtime
from moekern.op import Op, Policy, device_of


class use:
    """Ask for kernels, a backend, threads or batch invariance: at once, process-wide; undone by `with`.

        moekern.use(num_threads=4)                                   # from now on
        with moekern.use(kernel="fp8_gemm_nt=cpu.scalar"): ...       # in here

    backend: "cpu", "cuda", "rocm" or "npu"; operands elsewhere raise.
    kernel: "op=name", several separated by commas, or a dict. A kernel that cannot run raises with
        its reason; there is no silent fallback.
    batch_invariant: hold every call to kernels that take any number of rows, so that a row's bits
        are the same however many others it is computed with.
    num_threads: CPU threads; the default follows torch.get_num_threads().
    """

    def __init__(
        self,
        *,
        backend: str | None = None,
        kernel: str | dict[str, str] | None = None,
        batch_invariant: bool | None = None,
        num_threads: int | None = None,
    ) -> None:
        self._before = dispatcher.policy
        changes: dict[str, Any] = {}
        if backend is not None:
            changes["backend"] = _one_of("backend", backend, ("cpu", "cuda", "rocm", "npu"))
        if kernel is not None:
            changes["kernels"] = _forced(kernel, self._before)
        if batch_invariant is not None:
            changes["batch_invariant"] = bool(batch_invariant)
        if num_threads is not None:
            if num_threads < 1:
                raise ValueError(f"num_threads is {num_threads}; it must be at least 1")
            changes["num_threads"] = int(num_threads)
        _apply(replace(self._before, **changes))

    def __enter__(self) -> use:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _apply(self._before)


def explain(op: Op, *args: Any, **kwargs: Any) -> str:
    """Which kernel `op(*args, **kwargs)` would run, and why each better one would not. Computes nothing."""
    call = op.prepare(*args, **kwargs)
    return op.explain(device_of(call[op.output_index]), *call)


def _apply(policy: Policy) -> None:
    if policy.num_threads != dispatcher.policy.num_threads:
        runtime.connect(policy.num_threads)
    dispatcher.policy = policy


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it is one of {', '.join(allowed)}")
    return value


def _forced(kernel: str | dict[str, str], before: Policy) -> tuple[tuple[str, str], ...]:
    from moekern.ops import OPS

    if isinstance(kernel, str):
        pairs = dict(item.partition("=")[::2] for item in kernel.split(",") if item)
    else:
        pairs = dict(kernel)
    ops = {op.name: op for op in OPS}
    for name, wanted in pairs.items():
        _one_of("kernel's op", name, tuple(ops))
        _one_of(f"kernel of {name}", wanted, tuple(k.name for k in ops[name].kernels))
    return tuple({**dict(before.kernels), **pairs}.items())


def from_environment(environ: os._Environ[str] | dict[str, str] = os.environ) -> None:
    """MOEKERN_BACKEND, MOEKERN_KERNEL, MOEKERN_NUM_THREADS, MOEKERN_LOG; a wrong value raises."""
    level = environ.get("MOEKERN_LOG")
    if level:
        _one_of("MOEKERN_LOG", level.lower(), ("debug", "info", "warning", "error"))
        dispatcher.log.setLevel(level.upper())
        if not dispatcher.log.handlers:
            import logging

            dispatcher.log.addHandler(logging.StreamHandler())
    threads = environ.get("MOEKERN_NUM_THREADS")
    if threads and not threads.isdigit():
        raise ValueError(f"MOEKERN_NUM_THREADS is {threads!r}; it must be a positive integer")
    use(
        backend=environ.get("MOEKERN_BACKEND") or None,
        kernel=environ.get("MOEKERN_KERNEL") or None,
        num_threads=int(threads) if threads else None,
    )
