"""Triton's PTX for sm_90 gives the specs' numbers in the emulator: what its interpreter cannot show of a kernel."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import emulated_triton
import pytest

from moekern.backends._triton.kernels import why_not
from moekern.backends.cuda import emulator


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.skipif(not emulator.library_path().exists(), reason="built without the emulator")
def test_problems() -> None:
    script = Path(__file__).with_name("emulated_triton.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    assert [name for name, _, _ in rows] == [str(problem) for problem in emulated_triton.problems()], done.stderr[
        -4000:
    ]
    assert {name: said for name, said, _ in rows if said} == {}
