"""_C.pyi says what the native module has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_stub_and_the_module_agree(tmp_path):
    config = tmp_path / "mypy.ini"
    config.write_text("[mypy]\n[mypy-torch.*]\nfollow_imports = skip\n")  # `make types` reads torch
    done = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "moekern._C", "--mypy-config-file", config],
        cwd=ROOT,
        env={"MYPYPATH": "python"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
