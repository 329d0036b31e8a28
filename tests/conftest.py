"""Which kernels ran: said at the end of every session, and a failure where one should have and did not.

A kernel whose features this machine has must have run, if a test that uses it was selected.
MOEKERN_EXPECT_KERNELS (kernel names, comma-separated) makes the list exact: every op that has a
kernel of such a name must have run it, and no other may have run. CI sets it.

The processes of pytest-xdist collect and run; what they report is judged in the one that started them.
"""

from __future__ import annotations

import os
import zlib
from collections import defaultdict
from typing import Any

import emulated
import executors
import interpreted  # noqa: F401  # before any test imports Triton: it says how
import on_device
import pytest
import remote
from hypothesis import HealthCheck, settings

executors.sources += [remote.executors, on_device.executors]

settings.register_profile("local", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.hookimpl(tryfirst=True)  # before `-m` picks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        executor = getattr(item, "callspec", None) and item.callspec.params.get("executor")
        if on_device.is_here(executor):
            item.add_marker(pytest.mark.gpu)
    if not os.environ.get("MOEKERN_ALL_CASES"):
        left_out = thinned(items)
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def thinned(items: list[pytest.Item]) -> dict[pytest.Item, None]:
    """Cases that are left out: a slow executor's, or all executors' where MOEKERN_EVERY says that all are slow. Of a
    list of cases each executor takes others, and at least one."""
    least = int(os.environ.get("MOEKERN_EVERY", 1))
    lists = defaultdict(list)
    for item in items:
        asked = item.callspec.params if hasattr(item, "callspec") else {}
        executor, case = asked.get("executor"), asked.get("case")
        if executor is not None and case is not None:
            lists[item.function, str(executor), max(executor.every(case), least)].append(item)
    left_out = {}
    for (_, executor, every), cases in lists.items():
        every = min(every, len(cases))
        first = zlib.crc32(executor.encode()) % every
        left_out |= {item: None for number, item in enumerate(cases) if number % every != first}
    return left_out


def pytest_collection_finish(session: pytest.Session) -> None:
    for item in session.items:
        executor = getattr(item, "callspec", None) and item.callspec.params.get("executor")
        if executor:
            executors.asked[str(executor)] = executor.absent


def missing_kernels() -> list[str]:
    """What is wrong with the list of kernels that ran, in words."""
    wrong = []
    wanted = {name.strip() for name in os.environ.get("MOEKERN_EXPECT_KERNELS", "").split(",") if name.strip()}
    known = {name: name.partition("=")[2] for name in executors.asked}  # of "op=kernel", the kernel
    for name, absent in sorted(executors.asked.items()):
        if known[name] in wanted or (not wanted and not absent):
            if not executors.ran[name]:
                wrong.append(f"{name} did not run: {absent or 'every call was refused, failed or was deselected'}")
        elif wanted and executors.ran[name]:
            wrong.append(f"{name} ran, but MOEKERN_EXPECT_KERNELS does not list it")
    return wrong + [
        f"MOEKERN_EXPECT_KERNELS lists {name}, which no op has" for name in sorted(wanted - {*known.values()})
    ]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """In the process that started `node`, which has ended. One that crashed reports nothing, but a failed test."""
    for ran, asked in [getattr(node, "workeroutput", {}).get("kernels", ({}, {}))]:
        executors.ran.update(ran)
        executors.asked.update(asked)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["kernels"] = dict(executors.ran), executors.asked
    elif (
        executors.asked
        and not session.config.option.collectonly
        and exitstatus == pytest.ExitCode.OK
        and missing_kernels()
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not executors.asked or terminalreporter.config.option.collectonly:
        return
    terminalreporter.section("kernels that ran")
    for name in sorted(executors.ran):
        terminalreporter.line(f"{name}: {executors.ran[name]} calls")
    for name in remote.LAUNCHERS:
        if reason := remote.why_not(name):
            terminalreporter.line(f"no kernels of {name}: {reason}")
    if reason := emulated.absent():
        terminalreporter.line(f"no hand-written kernels of {emulated.TARGET}: {reason}")
    for problem in missing_kernels():
        terminalreporter.line(f"ERROR {problem}", red=True)
