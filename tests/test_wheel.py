"""The wheel, built from the source distribution built from the tree: what it holds and that it works alone."""

from __future__ import annotations

import os
import re
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

import moekern

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*command: str | Path, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Built by the first process of pytest-xdist that asks, for all of them."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "dist"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            build(folder)
    return folder


def build(folder: Path) -> None:
    # In isolation, the wheel from the sdist, as `pip install .` would get it: without kernels that need nvcc.
    options = {"MOEKERN_CUDA": "OFF", "MOEKERN_EMULATOR": "OFF"}
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, env={**os.environ, **options})


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (wheel,) = built.glob("*.whl")
    return wheel


def test_only_moekern_and_its_metadata(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    version = moekern.__version__
    assert {name.split("/")[0] for name in names} == {"moekern", f"moekern-{version}.dist-info"}
    suffixes = {Path(name).suffix for name in names if name.startswith("moekern/")}
    assert suffixes <= {".py", ".pyi", ".so", ".typed", ".json"}, "no C++ source, no build file"
    data = {name for name in names if name.endswith(".json")}
    assert data == {
        f"moekern/{path.relative_to(ROOT / 'python/moekern')}"
        for folder in ("onnx/operators", "models")
        for path in ROOT.glob(f"python/moekern/{folder}/*.json")
    }
    assert {"moekern/py.typed", "moekern/_C.pyi", f"moekern-{version}.dist-info/licenses/LICENSE"} <= set(names)
    sources = {
        f"moekern/{path.relative_to(folder)}"
        for folder in (ROOT / "python/moekern", ROOT)
        for path in (folder.rglob("*.py") if folder != ROOT else (ROOT / "backends").rglob("*.py"))
    }
    assert sources <= set(names)


def test_under_5_mb(wheel):
    assert wheel.stat().st_size < 5e6


def test_depends_on_torch_by_a_lower_bound_only(wheel):
    metadata = zipfile.ZipFile(wheel).read(f"moekern-{moekern.__version__}.dist-info/METADATA").decode()
    required = re.findall(r"^Requires-Dist: (?!.*extra ==)(.*)$", metadata, re.MULTILINE)
    assert len(required) == 1 and re.fullmatch(r"torch>=[\d.]+", required[0])


def test_the_native_module_links_to_nothing_but_the_system(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    (module,) = tmp_path.glob("moekern/_C*.so")
    needed = set(re.findall(r"\(NEEDED\).*\[(.*?)\]", run("readelf", "-d", module)))
    allowed = r"(ld-linux.*|lib(stdc\+\+|m|gcc_s|c|dl|pthread))\.so(\.\d+)?"
    assert not [name for name in needed if not re.fullmatch(allowed, name)]


def test_the_wheel_works_alone(wheel, tmp_path):
    """In an environment that has torch but not this source tree."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    packages = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])").strip())
    zipfile.ZipFile(wheel).extractall(packages)
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = run(python, "-c", "import moekern; print(moekern.__file__)", cwd=tmp_path, env=environment)
    assert Path(where.strip()).parent == packages / "moekern"
    assert ", 0 failed" in run(python, "-m", "moekern", "selftest", cwd=tmp_path, env=environment)


def test_the_sdist_holds_what_it_builds_from(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"CMakeLists.txt", "pyproject.toml", "LICENSE", "README.md", "csrc/bindings/module.cpp"} <= names
    assert not [name for name in names if name.split("/")[0] in ("build", "dist", ".venv")]
