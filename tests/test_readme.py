"""The documents' Python runs as it stands, block after block as a reader would paste it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def run(document: str) -> dict[str, Any]:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, document, "exec"), names)
    return names


def test_readme():
    names = run("README.md")
    assert names["y"].shape == names["d"].shape == (4, 576)


@pytest.mark.slow
def test_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    names = run("docs/onnx.md")
    assert names["report"].runtimes["onnxruntime"].rms < 1e-5
    assert set(names["weights"]) == {"up", "down"}


def test_engines():
    names = run("docs/engines.md")
    names["moekern_transformers"].uninstall()
    assert names["out"].shape == (5, 256)
    assert names["out"].isfinite().all()
    assert names["out"].abs().max() > 0.01
