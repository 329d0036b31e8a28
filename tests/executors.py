"""Who computes a call in the tests: every kernel of every op, and who knows whether it could run.

`sources` is the one place to plug in kernels that run elsewhere: conftest.py appends those of other
CPUs (remote.py) and of accelerators (on_device.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest

import moekern
from moekern import NotSupported
from moekern.op import Op
from moekern.ops import OPS


@dataclass(frozen=True)
class Executor:
    """Computes calls of one op with one kernel. `run` and `why_not` take what the op takes."""

    op: Op
    name: str
    run: Callable[..., Any]
    absent: str | None  # why the kernel cannot run on this machine at all
    why_not: Callable[..., str | None]  # why it cannot take this call
    asks: bool = True  # False: `run` itself raises NotSupported, at less cost than asking before every call
    threads: tuple[int, ...] = (1, 2, 3, 5, 5)  # for tests that no number of threads changes a bit
    # Of so many cases like this one is taken, unless MOEKERN_ALL_CASES asks for all: more than 1 where it is slow.
    every: Callable[[Any], int] = lambda case: 1

    def __str__(self) -> str:
        return f"{self.op.name}={self.name}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The op's result, or a skip that says why this kernel does not take the call."""
        if reason := self.absent or (self.asks and self.why_not(*args, **kwargs)):
            pytest.skip(f"{self.name} {reason}")
        try:
            result = self.run(*args, **kwargs)
        except NotSupported as refusal:
            if self.asks:
                raise
            pytest.skip(f"{self.name} {refusal}")
        ran[str(self)] += 1
        return result


ran: Counter[str] = Counter()  # calls of each executor
asked: dict[str, str | None] = {}  # every executor of a collected test: why it cannot run here, or None


def this_machine(op: Op) -> list[Executor]:
    """Every kernel of `op` for the CPU, forced by name."""
    device = moekern.devices()[0]

    def executor(kernel: moekern.Kernel) -> Executor:
        def run(*args: Any, **kwargs: Any) -> Any:
            with moekern.use(kernel={op.name: kernel.name}):
                return op(*args, **kwargs)

        def why_not(*args: Any, **kwargs: Any) -> str | None:
            call = op.prepare(*args, **kwargs)
            return kernel.why_not(device, *call)

        return Executor(op, kernel.name, run, kernel.lacks(device), why_not)

    return [executor(kernel) for kernel in op.kernels if kernel.kind == device.kind]


sources: list[Callable[[Op], list[Executor]]] = [this_machine]


def executors(*ops: Op) -> list[Executor]:
    return [executor for op in ops or OPS for source in sources for executor in source(op)]


Check = Callable[[Executor, Any], None]


def problems(lists: Iterable[tuple[Op, Iterable[Any], Check]], kernels: Callable[[Op], list[Executor]]) -> list[Any]:
    """Parameters (executor, check, case) of lists of (op, cases, what checks one), for each of the op's `kernels`."""
    return [
        pytest.param(executor, check, case, id=f"{executor}-{case}")
        for op, found, check in lists
        for executor in kernels(op)
        for case in found
    ]


def of(*ops: Op) -> pytest.MarkDecorator:
    """Parametrises `executor` with every kernel of the ops; all ops when none is named."""
    return pytest.mark.parametrize("executor", executors(*ops), ids=str)
