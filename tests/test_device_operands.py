"""No `prepare` looks at values on an accelerator: C++ that did would end its case by a signal, Python by an error."""

from __future__ import annotations

import subprocess
import sys

import device_operands
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs mmap and fork")


def run(*names: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, device_operands.__file__, *names]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    """What became of every case, by its name; a traceback of those that failed is in ["stderr"]."""
    done = run()
    rows = dict(line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line)
    return {**rows, "stderr": done.stderr}


@pytest.mark.parametrize("name", device_operands.CASES)
def test_values_are_left_to_the_kernels(name: str, results: dict[str, str]) -> None:
    assert results.get(name) == "ok", f"{results.get(name, 'did not run')}\n{results['stderr'][-3000:]}"


def test_every_op_is_covered() -> None:
    for kind in ("prepared", "refused"):
        assert {op.name for op in device_operands.OPS} == device_operands.covered(kind)


@pytest.mark.parametrize("looks", ["c++", "python"])
def test_a_look_is_noticed(looks: str) -> None:
    """The cases could fail: one that looks on purpose, by C++ and by Python."""
    done = run(looks)
    expected = "signal 11" if looks == "c++" else "Waited: item"
    assert done.stdout.splitlines() == [f"{looks}\t{expected}"], done.stderr[-3000:]
