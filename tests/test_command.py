"""`python -m moekern info` and `selftest`, also where the installation is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moekern
from moekern import ops
from moekern.ops import OPS
from moekern.testing import selftest


def run(*arguments: str, broken: tuple[Path, str] | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python arguments`; `broken` is (folder, code) that runs first in the new process."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("MOEKERN_")}
    environment = {**ours, **variables}
    if broken is not None:
        folder, code = broken
        (folder / "sitecustomize.py").write_text(code)
        environment["PYTHONPATH"] = str(folder)
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120)


def missing(module: str) -> str:
    return f"import sys; sys.modules[{module!r}] = None"


def test_info_as_json():
    done = run("-m", "moekern", "info", "--json", MOEKERN_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert not [name for name, part in report.items() if "error" in part]
    assert report["moekern"] == {
        "version": moekern.__version__,
        "location": str(Path(moekern.__file__).parent),
        "import_error": None,
    }
    assert {name: [k["name"] for k in kernels] for name, kernels in report["kernels"].items()} == {
        op.name: [kernel.name for kernel in op.kernels] for op in OPS
    }
    assert any(kernel["why_not"] is None for kernel in report["kernels"]["fp8_gemm_nt"])
    assert all(backend["devices"] or backend["absent"] for backend in report["backends"].values())
    assert report["threads"]["moekern"] == 1 and report["environment"]["MOEKERN_NUM_THREADS"] == "1"


def test_info_as_text():
    done = run("-m", "moekern", "info")
    assert done.returncode == 0, done.stderr
    for expected in (moekern.__version__, "Devices", "cuda    absent: ", "fp8_gemm_nt", "cpu.scalar ", "OpenMP loaded"):
        assert expected in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 200


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (missing("torch"), "import of torch halted"),
        (missing("moekern._C"), "import of moekern._C halted"),
        ("import os; os.environ['MOEKERN_KERNEL'] = 'fp8_gemm_nt=cpu.quantum'", "cpu.quantum"),
    ],
)
def test_a_broken_installation_is_reported(tmp_path, code, told):
    text = run("-m", "moekern", "info", broken=(tmp_path, code))
    assert text.returncode == 0, text.stderr
    assert "cannot be imported: " in text.stdout and told in text.stdout and "Environment" in text.stdout
    report = json.loads(run("-m", "moekern", "info", "--json", broken=(tmp_path, code)).stdout)
    assert told in report["moekern"]["import_error"] and report["python"]["location"] == sys.executable

    failed = run("-m", "moekern", "selftest", broken=(tmp_path, code))
    assert failed.returncode == 1 and told in failed.stderr
    plain = run("-c", "import moekern", broken=(tmp_path, code))
    assert plain.returncode == 1 and told in plain.stderr, "only the command survives a failed import"


def test_a_torch_that_fails_halfway_is_reported(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libtorch_cpu.so: cannot open shared object file')")
    done = run("-m", "moekern", "info", broken=(tmp_path, ""))
    assert done.returncode == 0 and "libtorch_cpu.so: cannot open" in done.stdout


def test_the_script_is_the_module():
    script = Path(sys.executable).with_name("moekern")
    done = subprocess.run([script, "info"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("moekern ")


def test_selftest_runs_every_kernel():
    done = run("-m", "moekern", "selftest")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 1 + sum(len(op.kernels) for op in OPS)
    assert ", 0 failed, " in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_selftest_finds_a_wrong_kernel(op, monkeypatch, capsys):
    good = next(kernel for kernel in op.kernels if kernel.absent(moekern.devices()) is None)

    def run_wrongly(*call):
        good.run(*call)
        data = call[op.output_index]
        while not isinstance(data, torch.Tensor):
            data = data.data if isinstance(data, moekern.ScaledTensor) else data[0]
        data.view(torch.uint8)[-1, -1] ^= 1

    wrong = moekern.Kernel("cpu.wrong", run_wrongly, "cpu", refuses=good.refuses)
    monkeypatch.setattr(op, "kernels", [*op.kernels, wrong])
    monkeypatch.setattr(ops, "OPS", (op,))
    assert selftest.main() == 1
    failures = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert len(failures) == 1 and "cpu.wrong" in failures[0] and "differ" in failures[0]
