"""No kernel touches memory beside its operands: a read there would end this script by a signal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_no_kernel_reads_beside_its_operands() -> None:
    script = Path(__file__).with_name("guarded.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100, check=False)
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0 and last == ["done"], f"exit {done.returncode} after {last}\n{done.stderr[-1500:]}"
