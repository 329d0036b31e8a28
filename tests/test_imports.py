"""Who may import whom, read from the source; and what `import moekern` brings along."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("cpu", "cuda", "rocm", "ascend")
VENDORS = {  # package -> the backends that may import it
    "torch_npu": {"ascend"},
    "acl": {"ascend"},
    "triton": {"_triton", "cuda", "rocm", "ascend"},
    "cuda": {"cuda"},
    "cupy": {"cuda"},
    "pynvml": {"cuda"},
    "hip": {"rocm"},
    "amdsmi": {"rocm"},
}
VENDOR_HEADERS = {  # beginning of an include -> the backends that may include it
    "cuda": {"cuda"},
    "nvrtc": {"cuda"},
    "hip/": {"rocm"},
    "acl/": {"ascend"},
    "kernel_operator": {"ascend"},
    "immintrin": {"cpu"},
    "cpuid": {"cpu"},
    "arm_neon": {"cpu"},
    "arm_sve": {"cpu"},
}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def sources(folder: str, *suffixes: str) -> list[Path]:
    found = [path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    assert found, f"no {suffixes} in {folder}"
    return found


def family_of(path: Path) -> str:
    inside = path.relative_to(ROOT / "backends").parts
    return inside[0] if len(inside) > 1 else ""


def test_specs_import_no_backend() -> None:
    for path in sources("python/moekern/ops", ".py"):
        assert not [name for name in imports(path) if name.startswith("moekern.backends")], path


def test_op_and_scaled_stand_alone() -> None:
    """Everything else builds on these two."""
    for path, allowed in (("op.py", {"moekern.scaled"}), ("scaled.py", set())):
        ours = {
            name.rsplit(".", 1)[0] for name in imports(ROOT / "python/moekern" / path) if name.startswith("moekern")
        }
        assert ours <= allowed, path


def test_backends_never_import_each_other() -> None:
    for path in sources("backends", ".py"):
        for name in imports(path):
            parts = name.split(".")
            if parts[:2] == ["moekern", "backends"] and len(parts) > 2:
                assert parts[2] in (family_of(path), "_triton", "_native"), f"{path} imports {name}"
            elif parts[0] == "moekern":
                allowed = ("op", "ops", "scaled", "weights", "experts", "layout", "_C")  # what operands are, and specs
                assert parts[1] in allowed, f"{path} imports {name}"


def test_testing_needs_only_torch_and_moekern() -> None:
    for path in sources("python/moekern/testing", ".py"):
        tops = {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names
        assert tops <= {"torch", "moekern"}, path


def test_vendor_packages_stay_in_their_backend() -> None:
    for path in sources("python", ".py") + sources("backends", ".py"):
        where = family_of(path) if path.is_relative_to(ROOT / "backends") else ""
        for name in imports(path):
            allowed = VENDORS.get(name.split(".")[0])
            assert allowed is None or where in allowed, f"{path} imports {name}"


def test_only_the_bindings_know_python() -> None:
    for path in sources("csrc", ".h", ".cpp") + sources("backends", ".h", ".cpp", ".inc", ".cu", ".cuh"):
        python = [i for i in includes(path) if i.startswith("pybind11") or i == "Python.h"]
        assert not python or path.parent == ROOT / "csrc/bindings", f"{path} includes {python}"


def test_nobody_includes_torch() -> None:
    for path in sources("csrc", ".h", ".cpp") + sources("backends", ".h", ".cpp", ".inc", ".cu", ".cuh"):
        assert not [i for i in includes(path) if i.startswith(("torch/", "ATen/", "c10/"))], path


def test_native_code_stays_in_its_folder() -> None:
    for path in sources("csrc", ".h", ".cpp"):
        for include in includes(path):
            assert not include.startswith(tuple(f"{family}/" for family in FAMILIES)), f"{path} includes {include}"
            assert not include.startswith(tuple(VENDOR_HEADERS)), f"{path} includes {include}"
    for path in sources("backends", ".h", ".cpp", ".inc", ".cu", ".cuh"):
        for include in includes(path):
            other = [f for f in FAMILIES if f != family_of(path) and include.startswith(f"{f}/")]
            assert not other, f"{path} includes {include}"
            for prefix, allowed in VENDOR_HEADERS.items():
                assert not include.startswith(prefix) or family_of(path) in allowed, f"{path} includes {include}"


def test_csrc_compiles_without_any_backend(tmp_path: Path) -> None:
    pybind11 = pytest.importorskip("pybind11")
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "moekern").mkdir()
    (tmp_path / "moekern" / "backends.inc").write_text("")
    folders = [ROOT / "csrc", tmp_path, pybind11.get_include(), sysconfig.get_paths()["include"]]
    # Other files can't know a backend: they include neither this list nor, as tested above, a backend's headers.
    named = [str(path) for path in sources("csrc", ".cpp") if "moekern/backends.inc" in includes(path)]
    assert named
    command = [compiler, "-std=c++17", "-fsyntax-only", *(f"-I{folder}" for folder in folders), *named]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:2000]


def test_import_brings_nothing_along() -> None:
    """After torch, `import moekern` loads moekern and the standard library only."""
    body = "import sys, torch; before = set(sys.modules); import moekern; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, check=True).stdout.split()
    tops = {name.split(".")[0] for name in loaded} - sys.stdlib_module_names
    assert tops == {"moekern"}, tops - {"moekern"}
    assert not [name for name in loaded if name.startswith("moekern.testing")]


A_GPU = """
import sys, types, torch
torch.version.{vendor} = "13.0"
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
torch.cuda.get_device_properties = lambda i: types.SimpleNamespace(
    name="a GPU", major=9, minor=0, gcnArchName="gfx942:sramecc+"
)
sys.modules.update(dict.fromkeys({absent!r}))
"""


def beside_a_gpu(body: str, vendor: str = "cuda", absent: tuple[str, ...] = ()) -> str:
    """What a process prints in which torch finds a GPU, and Python does not find some packages."""
    script = A_GPU.format(vendor=vendor, absent=absent) + body
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_opens_no_driver() -> None:
    """Where torch finds no GPU, whatever driver there is stays closed."""
    body = "import moekern; print([line for line in open('/proc/self/maps') if 'libcuda.so' in line])"
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, check=True)
    assert torch.cuda.is_available() or done.stdout == "[]\n"


def test_import_finds_a_gpu_without_importing_triton_or_cupy() -> None:
    pytest.importorskip("triton")
    said = beside_a_gpu("""
import moekern
print(moekern.devices()[1].arch, *moekern.fp8_gemm_nt.kernels[-1].needs, dict(moekern.devices()[1].without).keys())
print({"triton", "cupy"} & set(sys.modules))
""")
    assert said.splitlines() == ["sm_90 triton dict_keys(['hopper'])", "set()"]  # there is no driver


@pytest.mark.parametrize(
    ("kind", "vendor", "arch", "what"),
    [
        ("cuda", "cuda", "sm_90", "pip install 'moekern[cuda]'"),
        ("rocm", "hip", "gfx942", "torch for ROCm brings it"),
    ],
)
def test_a_gpu_without_triton(kind: str, vendor: str, arch: str, what: str) -> None:
    """The report and the errors say what is missing, and the CPU's kernels run."""
    body = """
import moekern
from moekern import info

print(info.as_text(info.collect()))
w = moekern.per_block_cast_to_fp8(torch.ones(3, 5))
assert moekern.fp8_gemm_nt(torch.ones(2, 5), w).eq(5).all()
moekern.use(kernel={"fp8_gemm_nt": moekern.fp8_gemm_nt.kernels[-1].name})
try:
    moekern.fp8_gemm_nt.select(moekern.devices()[1])
except moekern.NotSupported as error:
    print(error)
"""
    lines = beside_a_gpu(body, vendor, absent=("triton", "cupy")).splitlines()
    reason = f"needs triton; Triton is not installed ({what})"
    rows = [line.split(maxsplit=1)[1] for line in lines if line.split()[:1] == [f"{kind}.triton"]]
    assert set(rows) == {f"no: {reason}"}
    assert lines[-1] == f"fp8_gemm_nt: forced kernel {kind}.triton {reason}"
    assert any(line.split()[:2] == [kind, "0:"] and arch in line for line in lines)


def test_triton_under_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds for torch are distributed as packages of their own."""
    from importlib import metadata

    from moekern.backends._triton import kernels

    pytest.importorskip("triton")

    for found, said in (("3.6.0+gitabc", None), ("3.5.1", "Triton is 3.5.1; 3.6 or later is needed")):
        known = {"pytorch-triton-rocm": found}

        def version(name: str, known: dict[str, str] = known) -> str:
            if name not in known:
                raise metadata.PackageNotFoundError(name)
            return known[name]

        monkeypatch.setattr(metadata, "version", version)
        assert kernels.why_not() == said
    monkeypatch.setattr(kernels, "_DISTRIBUTIONS", ())
    assert kernels.why_not() is None
