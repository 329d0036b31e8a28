"""The list of kernels that ran (conftest.py): a kernel that was skipped without need fails the session."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import conftest
import executors
import pytest

import moekern


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> dict[str, executors.Executor]:
    """A session that asked for three kernels of one op; the third needs what this machine has not."""

    def executor(name: str, absent: str | None = None) -> executors.Executor:
        return executors.Executor(moekern.dequantize, name, lambda: None, absent, lambda: None)

    made = {e.name: e for e in (executor("cpu.good"), executor("cpu.plain"), executor("cpu.exotic", "needs exotic"))}
    monkeypatch.setattr(executors, "asked", {str(e): e.absent for e in made.values()})
    monkeypatch.setattr(executors, "ran", type(executors.ran)())
    monkeypatch.delenv("MOEKERN_EXPECT_KERNELS", raising=False)
    return made


def test_what_the_machine_has_must_run(session: dict[str, executors.Executor]) -> None:
    session["cpu.good"]()
    assert conftest.missing_kernels() == [
        "dequantize=cpu.plain did not run: every call was refused, failed or was deselected"
    ]
    session["cpu.plain"]()
    assert conftest.missing_kernels() == []


def test_a_skip_names_the_reason(session: dict[str, executors.Executor]) -> None:
    with pytest.raises(pytest.skip.Exception, match=r"cpu\.exotic needs exotic"):
        session["cpu.exotic"]()
    assert not executors.ran


def test_the_expected_list_is_exact(session: dict[str, executors.Executor], monkeypatch: pytest.MonkeyPatch) -> None:
    session["cpu.good"]()
    session["cpu.plain"]()
    monkeypatch.setenv("MOEKERN_EXPECT_KERNELS", "cpu.good, cpu.plain")
    assert conftest.missing_kernels() == []
    monkeypatch.setenv("MOEKERN_EXPECT_KERNELS", "cpu.good,cpu.exotic,cpu.typo")
    assert conftest.missing_kernels() == [
        "dequantize=cpu.exotic did not run: needs exotic",
        "dequantize=cpu.plain ran, but MOEKERN_EXPECT_KERNELS does not list it",
        "MOEKERN_EXPECT_KERNELS lists cpu.typo, which no op has",
    ]


@pytest.mark.parametrize("processes", [0, 2])
def test_processes_report_to_the_one_that_judges(processes: int) -> None:
    """The calls of a test file are counted, and judged, wherever they ran: pytest-xdist deals them out."""
    test = f"{Path(__file__).with_name('test_determinism.py')}::test_dequantize_for_any_number_of_threads"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"-n{processes}", "--dist=load", test],
        env={**os.environ, "MOEKERN_EXPECT_KERNELS": "cpu.scalar,cpu.typo"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    here, said = moekern.devices()[0], done.stdout.splitlines()
    ran = [f"dequantize={k.name}" for k in moekern.dequantize.kernels if k.lacks(here) is None]
    assert {f"{name}: 5 calls" for name in ran} <= set(said), done.stdout + done.stderr
    errors = [line for line in said if line.startswith("ERROR") and ":" not in line]
    assert errors == [
        f"ERROR {name} ran, but MOEKERN_EXPECT_KERNELS does not list it"
        for name in sorted(ran)
        if name != "dequantize=cpu.scalar"
    ] + ["ERROR MOEKERN_EXPECT_KERNELS lists cpu.typo, which no op has"]
    assert done.returncode == pytest.ExitCode.TESTS_FAILED and "failed" not in said[-1]


class Item:
    """A collected test of one executor and case."""

    def __init__(self, every: int, name: str, case: int) -> None:
        slow = executors.Executor(moekern.dequantize, name, lambda: None, None, lambda: None, every=lambda case: every)
        self.function = test_what_the_machine_has_must_run
        self.callspec = SimpleNamespace(params={"executor": slow, "case": case})


@pytest.mark.parametrize(("every", "least", "taken"), [(1, 1, 12), (1, 3, 4), (4, 3, 3), (100, 1, 1)])
def test_some_cases_of_a_slow_executor(every: int, least: int, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEKERN_EVERY", str(least))
    items = [Item(every, name, case) for name in ("cpu.one", "cpu.other") for case in range(12)]
    left_out = conftest.thinned(items)  # type: ignore[arg-type]
    for name in ("cpu.one", "cpu.other"):
        of_it = [item for item in items if item.callspec.params["executor"].name == name]
        assert len([item for item in of_it if item not in left_out]) == taken
