"""The build with and without kernels for Hopper: what is embedded, what is said where they are not."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from test_imports import A_GPU

import moekern
from moekern import _C
from moekern.backends import cuda

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "backends/cuda/kernels"
HEADERS = "nvidia/cu13/include"
MACHINE_CUDA = 190  # e_machine of ELF


def modules() -> dict[str, tuple[bytes, list[str]]]:
    if "cuda" not in _C.native:
        pytest.skip("_C is built without kernels for CUDA")
    return _C.native["cuda"]["modules"]()


def test_every_source_is_embedded_as_a_cubin() -> None:
    found = modules()
    assert set(found) == {path.stem for path in KERNELS.glob("*.cu")}
    for name, (image, kernels) in found.items():
        magic, machine = image[:4], struct.unpack_from("<H", image, 18)[0]
        assert magic == b"\x7fELF" and machine == MACHINE_CUDA, name
        assert kernels and len(set(kernels)) == len(kernels)
        for kernel in kernels:
            assert f".text.{kernel}\0".encode() in image, f"{name} has no code for {kernel}"


def test_kernels_have_names_of_their_own() -> None:
    """They are looked up by name alone."""
    names = [kernel for _, kernels in modules().values() for kernel in kernels]
    assert len(set(names)) == len(names)


def test_the_kernels_are_those_that_are_named_where_nothing_is_built() -> None:
    modules()
    for op in moekern.ops.OPS:
        assert [row[0] for row in _C.native["cuda"]["kernels"].get(op.name, [])] == cuda.names(op), op.name


# A process whose _C has no kernels for CUDA, beside a GPU.
NOT_BUILT = """
import importlib.machinery, importlib.util
loader = importlib.machinery.ExtensionFileLoader("moekern._C", {path!r})
module = importlib.util.module_from_spec(importlib.util.spec_from_loader("moekern._C", loader))
loader.exec_module(module)
module.native.pop("cuda", None)
sys.modules["moekern._C"] = module
"""
SAY = """
import moekern
from moekern import info
device = moekern.devices()[1]
for op in moekern.ops.OPS:
    for kernel in op.kernels:
        if kernel.name.startswith("cuda.hopper"):
            print(op.name, kernel.name, kernel.lacks(device), sep="|")
print("features", "hopper" in device.features)
print(info.as_text(info.collect()))
w = moekern.per_block_cast_to_fp8(torch.ones(3, 5))
x = torch.ones(2, 5)
print(moekern.dequantize.explain(device, w, torch.empty(3, 5), None))
"""


def beside_a_hopper(body: str, **environment: str) -> str:
    script = A_GPU.format(vendor="cuda", absent=()) + body
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_refused_for(said: str, reason: str) -> None:
    """By every op's hand-written kernels; Triton's come next; the report and explain have the reason."""
    rows = [line.split("|") for line in said.splitlines() if line.count("|") == 2]
    assert {row[0] for row in rows} == {op.name for op in moekern.ops.OPS if cuda.names(op)}
    assert {row[2] for row in rows} == {f"needs hopper; {reason}"}
    assert "features False" in said
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert f"cuda.hopper no: needs hopper; {reason}" in lines
    assert f"cuda.hopper: needs hopper; {reason}" in lines
    assert "dequantize on cuda (sm_90): cuda.triton" in lines


def test_a_build_without_kernels_says_so() -> None:
    pytest.importorskip("triton")
    said = beside_a_hopper(NOT_BUILT.format(path=_C.__file__) + SAY)
    assert_refused_for(said, "this moekern is built without them (MOEKERN_CUDA was off)")


def test_a_missing_driver_is_a_reason() -> None:
    modules()
    pytest.importorskip("triton")
    said = beside_a_hopper(SAY, MOEKERN_CUDA_DRIVER="/nowhere/libcuda.so.1")
    why = "no CUDA driver: /nowhere/libcuda.so.1: cannot open shared object file: No such file or directory"
    assert_refused_for(said, why)


def test_with_a_driver_they_come_first(tmp_path: Path) -> None:
    import stub_driver

    stub = stub_driver.build(tmp_path)
    said = beside_a_hopper(SAY, MOEKERN_CUDA_DRIVER=str(stub.path))
    assert "features True" in said
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert "dequantize on cuda (sm_90): cuda.hopper" in lines
    assert "cuda.hopper usable" in lines


def test_other_architectures_get_tritons() -> None:
    assert cuda.why_not_hopper("sm_100") == "these kernels are for sm_90, not sm_100"


def configured(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """CMake's first step with MOEKERN_CUDA=ON, by a Python that has no packages unless `options` say otherwise."""
    pybind11 = pytest.importorskip("pybind11")
    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    if cmake is None:
        pytest.skip("no CMake")
    bare = folder / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    found = (f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPYTHON_EXECUTABLE={sys.executable}")
    command = [cmake, "-S", ROOT, "-B", folder / "build", "-DMOEKERN_CUDA=ON", f"-DPython_EXECUTABLE={bare}", *found]
    return subprocess.run(
        [*command, *options], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_without_nvcc_the_build_says_what_to_install(tmp_path: Path) -> None:
    """Even where one is on the path: only what is named, or installed beside the build, is used."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho nvcc of the path was run >&2; exit 1\n")
    nvcc.chmod(0o755)
    done = configured(tmp_path, PATH=f"{nvcc.parent}:{os.environ['PATH']}")
    said = " ".join(done.stderr.split())
    assert done.returncode != 0
    assert "MOEKERN_CUDA is on, and" in said and "has no complete nvcc of CUDA 13" in said
    for wheel in ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime", "nvidia-cuda-cccl"):
        assert f"'{wheel}>=13,<14'" in said
    assert "of the path" not in done.stdout + done.stderr


def test_a_named_nvcc_of_another_release_is_refused(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
    nvcc.chmod(0o755)
    done = configured(tmp_path, f"-DMOEKERN_NVCC={nvcc}")
    assert done.returncode != 0
    assert f"{nvcc} is not nvcc of CUDA 13, which this is built with" in " ".join(done.stderr.split())


def test_the_wheels_are_named_alike_everywhere() -> None:
    built = {
        frozenset(re.findall(r"(nvidia-[a-z-]+)>=13,<14", (ROOT / name).read_text()))
        for name in ("pyproject.toml", "backends/cuda/CMakeLists.txt")
    }
    pinned = re.findall(r"(nvidia-[a-z-]+)==13\.", (ROOT / "requirements-dev.txt").read_text())
    assert len(pinned) == 5 and built == {frozenset(pinned)}


# Our prototypes beside cuda.h's: as many parameters, of as many bytes, pointers where there are pointers.
PROTOTYPES = """
#include <cuda.h>
#include <cstddef>
#include <type_traits>
#include "cuda/driver.h"
using namespace moekern::cuda;
template <class Ours, class Theirs> struct Alike : std::false_type {};
template <class R, class... A, class S, class... B>
struct Alike<R(A...), S(B...)> {
  static constexpr bool value = [] {
    if constexpr (sizeof...(A) != sizeof...(B)) return false;
    else return sizeof(R) == sizeof(S) &&
           ((sizeof(A) == sizeof(B) && std::is_pointer_v<A> == std::is_pointer_v<B>) && ...);
  }();
};
#define MOEKERN_DRIVER_FUNCTION(NAME, PARAMETERS) \\
  static_assert(Alike<Result PARAMETERS, decltype(::NAME)>::value, #NAME);
MOEKERN_DRIVER_FUNCTIONS(MOEKERN_DRIVER_FUNCTION)
static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) == 64);
static_assert(sizeof(LaunchAttribute) == sizeof(CUlaunchAttribute));
static_assert(offsetof(LaunchAttribute, room) == offsetof(CUlaunchAttribute, value));
static_assert(sizeof(LaunchConfig) == sizeof(CUlaunchConfig));
static_assert(offsetof(LaunchConfig, block) == offsetof(CUlaunchConfig, blockDimX));
static_assert(offsetof(LaunchConfig, shared_bytes) == offsetof(CUlaunchConfig, sharedMemBytes));
static_assert(offsetof(LaunchConfig, stream) == offsetof(CUlaunchConfig, hStream));
static_assert(offsetof(LaunchConfig, attributes) == offsetof(CUlaunchConfig, attrs));
static_assert(offsetof(LaunchConfig, count) == offsetof(CUlaunchConfig, numAttrs));
static_assert(LaunchAttribute::kClusterDimension == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION);
static_assert(LaunchAttribute::kProgrammaticSerialization == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);
static_assert(kProcessors == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
static_assert(kSharedBytesOptIn == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
static_assert(kDynamicSharedBytes == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
static_assert(kRelaxedCapture == CU_STREAM_CAPTURE_MODE_RELAXED);
"""


def test_prototypes_agree_with_the_drivers_header(tmp_path: Path) -> None:
    headers = next((path for path in sys.path if Path(path, HEADERS, "cuda.h").is_file()), None)
    compiler = shutil.which("c++")
    if headers is None or compiler is None:
        pytest.skip("no cuda.h of the wheels, or no compiler")
    source = tmp_path / "prototypes.cpp"
    source.write_text(PROTOTYPES)
    folders = [f"-I{headers}/{HEADERS}", f"-I{ROOT / 'backends'}", f"-I{ROOT / 'csrc'}"]
    done = subprocess.run(
        [compiler, "-std=c++17", "-fsyntax-only", *folders, source], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
