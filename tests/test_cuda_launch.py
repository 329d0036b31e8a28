"""From a call to the driver: what is loaded and launched, once and where; what errors say. No kernel runs."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import stub_driver
import torch
from stub_driver import Stub

import moekern
from moekern import _C


@pytest.fixture
def stub(tmp_path: Path):
    with stub_driver.build(tmp_path).used() as stub:
        yield stub


RUN, REFUSES = range(2)


def dequantize(*args) -> None:
    stub_driver.row("dequantize")[RUN](*stub_driver.dequantize_call(*args))


def test_a_module_is_loaded_once_and_its_cubin(stub: Stub) -> None:
    for _ in range(3):
        dequantize()
    assert (stub.loads, stub.lookups, stub.launches, stub.attributes) == (1, 1, 3, 0)
    assert stub.image.startswith(b"\x7fELF")
    launch = stub.launch
    assert launch.kernel == b"dequantize_f32" and list(launch.block) == [256, 1, 1] and launch.cluster == 1
    assert list(launch.grid) == [32 * 64 // 4 // (4 * 256) or 1, 1, 1]
    dequantize(32, 64, torch.float16)
    assert (stub.loads, stub.lookups) == (1, 2) and stub.launch.kernel == b"dequantize_f16"


def test_modules_may_be_loaded_while_a_graph_is_captured(stub: Stub) -> None:
    """The driver allows it to a thread in the relaxed mode of capture, and to no other."""
    dequantize()
    assert stub.capture_mode == 2
    mode = ctypes.c_int(7)
    stub.library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    assert mode.value == 0  # as it was before


def test_the_context_of_the_thread_is_set_back(stub: Stub) -> None:
    dequantize()
    assert stub.launch.device == 0
    context = ctypes.c_void_p(1)
    stub.library.cuCtxGetCurrent(ctypes.byref(context))
    assert not context.value


def test_threads_that_come_first_together_load_once(tmp_path: Path) -> None:
    with stub_driver.build(tmp_path).used() as stub:
        stub.set(load_nanoseconds=50_000_000)
        calls = [stub_driver.dequantize_call() for _ in range(16)]
        run, _ = stub_driver.row("dequantize")
        gate = threading.Barrier(len(calls))
        failed: list[BaseException] = []

        def work(call: tuple) -> None:
            gate.wait()
            try:
                for _ in range(20):
                    run(*call)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(call,)) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert (stub.loads, stub.lookups, stub.launches, stub.retained) == (1, 1, 320, 1)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("cuInit", "cuInit of "),
        ("cuDeviceGet", "cuDeviceGet of device 0"),
        ("cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRetain of device 0"),
        ("cuModuleLoadData", "cuModuleLoadData of module dequantize ("),
        ("cuModuleGetFunction", "cuModuleGetFunction of dequantize_f32 in module dequantize on device 0"),
        ("cuLaunchKernelEx", "cuLaunchKernelEx of dequantize_f32 (grid 1 x 1 x 1, 256 threads, clusters of 1, 0 bytes"),
    ],
)
def test_errors_say_what_was_tried(stub: Stub, function: str, said: str) -> None:
    stub.set(fails=function.encode(), result=209)
    with pytest.raises(RuntimeError) as caught:
        dequantize()
    message = str(caught.value)
    assert message.startswith(said), message
    assert "CUDA_ERROR_NO_BINARY_FOR_GPU (no kernel image is available for execution on the device)" in message


def test_what_failed_is_tried_again(stub: Stub) -> None:
    for function in ("cuDevicePrimaryCtxRetain", "cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernelEx"):
        stub.set(fails=function.encode())
        with pytest.raises(RuntimeError, match=function):
            dequantize()
    stub.set(fails=b"")
    dequantize()
    assert stub.launch.kernel == b"dequantize_f32"


def test_without_a_driver_the_error_names_the_library() -> None:
    stub_driver.row("dequantize") if "cuda" in _C.native else pytest.skip("_C is built without kernels for CUDA")
    _C.native["cuda"]["use_driver"]("/nowhere/libcuda.so.1")
    try:
        with pytest.raises(RuntimeError, match=r"no CUDA driver: /nowhere/libcuda.so.1: cannot open shared object"):
            dequantize()
        assert "/nowhere/libcuda.so.1" in _C.native["cuda"]["why_no_driver"]()
    finally:
        _C.native["cuda"]["use_driver"](None)


def test_a_library_that_is_no_driver(tmp_path: Path) -> None:
    stub = stub_driver.build(tmp_path, "-DcuTensorMapEncodeTiled=renamed")
    with stub.used(), pytest.raises(RuntimeError, match=r"stub_\d+.so has no function cuTensorMapEncodeTiled"):
        dequantize()


def test_an_old_driver_is_a_reason(stub: Stub) -> None:
    assert _C.native["cuda"]["why_no_driver"]() == ""
    stub.set(version=12040)
    assert _C.native["cuda"]["why_no_driver"]() == (
        "the driver is of CUDA 12.4; these kernels are compiled for a driver of CUDA 13.0 or later"
    )
    assert stub.retained == 0  # nothing was initialised to know it


def test_the_environment_names_a_driver(tmp_path: Path) -> None:
    stub = stub_driver.build(tmp_path)
    assert process(stub, "run(*stub_driver.dequantize_call()); print(stub.launches)") == "1\n"


# A process that takes its operands for ones of cuda:3, read through the table of torch or by attribute.
ELSEWHERE = """
import ctypes, torch
from moekern import runtime
from moekern.runtime import _allocate, _NAMES
CUDA, DEVICE, STREAM = 2, 3, 0x1230

def by_attribute():
    del torch.Tensor.__dlpack_c_exchange_api__
    read = lambda x: (*runtime._read(x)[:-1], CUDA | DEVICE << 16)
    def stream(kind, index):
        assert (kind, index) == (CUDA, DEVICE)
        return STREAM
    _C.connect(moekern.ScaledTensor, torch.Tensor, lambda: 1, read, _allocate, stream, _NAMES)
    assert not _C.uses_exchange_table()

class Table(ctypes.Structure):
    _fields_ = [("header", ctypes.c_void_p * 2)] + [
        (name, ctypes.c_void_p) for name in ("allocate", "managed", "to_object", "view", "stream")
    ]

class View(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("kind", ctypes.c_int32), ("index", ctypes.c_int32)]

@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(View))
def view(x, seen):
    result = real_view(x, seen)
    seen[0].kind, seen[0].index = CUDA, DEVICE
    return result

@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))
def stream(kind, index, out):
    assert (kind, index) == (CUDA, DEVICE)
    out[0] = STREAM
    return 0

def through_the_table():
    global real_view, table
    api = ctypes.pythonapi
    api.PyCapsule_GetPointer.restype, api.PyCapsule_New.restype = ctypes.c_void_p, ctypes.py_object
    name = ctypes.c_char_p(b"dlpack_exchange_api")
    capsule = torch.Tensor.__dlpack_c_exchange_api__
    table = Table.from_buffer_copy(Table.from_address(api.PyCapsule_GetPointer(ctypes.py_object(capsule), name)))
    real_view = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(View))(table.view)
    table.view = ctypes.cast(view, ctypes.c_void_p)
    table.stream = ctypes.cast(stream, ctypes.c_void_p)
    torch.Tensor.__dlpack_c_exchange_api__ = api.PyCapsule_New(ctypes.byref(table), name, None)
    runtime.connect(1)
    assert _C.uses_exchange_table()

call = stub_driver.dequantize_call()
{how}()
run(*call)
launch = stub.launch
assert (launch.device, launch.stream) == (DEVICE, STREAM), (launch.device, launch.stream)
print("there")
"""


def process(stub: Stub, body: str) -> str:
    """What a process prints in which the environment names this driver."""
    head = "import sys, moekern, stub_driver\nfrom moekern import _C\nstub = stub_driver.Stub(sys.argv[1])\n"
    head += "run, _ = stub_driver.row('dequantize')\n"
    done = subprocess.run(
        [sys.executable, "-c", head + body, str(stub.path)],
        cwd=Path(__file__).parent,
        env={**os.environ, "MOEKERN_CUDA_DRIVER": str(stub.path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("how", ["by_attribute", "through_the_table"])
def test_kernels_go_to_the_current_stream_of_their_operands_device(tmp_path: Path, how: str) -> None:
    if how == "through_the_table" and not _C.uses_exchange_table():
        pytest.skip("this torch has no exchange table")
    assert process(stub_driver.build(tmp_path), ELSEWHERE.replace("{how}", how)) == "there\n"


# ---- tensor maps --------------------------------------------------------------------------------------


def gemm(b: moekern.ScaledTensor, a: moekern.ScaledTensor) -> None:
    call = moekern.fp8_gemm_nt.prepare(a, b)
    run, refuses = stub_driver.row("fp8_gemm_nt")
    assert refuses(*call) is None
    run(*call)


def weights(rows: int, columns: int = 128) -> moekern.ScaledTensor:
    return moekern.per_block_cast_to_fp8(torch.ones(rows, columns))


@pytest.fixture
def a() -> moekern.ScaledTensor:
    return moekern.per_token_cast_to_fp8(torch.ones(64, 128))


def maps(stub: Stub, b: moekern.ScaledTensor, a: moekern.ScaledTensor) -> int:
    """How many a product encodes."""
    before = stub.maps
    gemm(b, a)
    return stub.maps - before


def test_maps_of_weights_are_remembered(stub: Stub, a: moekern.ScaledTensor) -> None:
    b = weights(256)
    first = maps(stub, b, a)
    assert [maps(stub, b, a) for _ in range(3)] == [first - 1] * 3


def test_another_tensor_at_the_address_has_another_map(stub: Stub, a: moekern.ScaledTensor) -> None:
    """As when memory is freed and given out again: fewer rows, other strides, then what was there before."""
    b = weights(256)
    known = maps(stub, b, a) - 1
    fewer = moekern.ScaledTensor(b.data[:128], b.scale[:1], b.block)
    every_other = moekern.ScaledTensor(b.data[::2], b.scale[:1], b.block)
    assert fewer.data.data_ptr() == every_other.data.data_ptr() == b.data.data_ptr()
    for other in (fewer, every_other):
        assert maps(stub, other, a) == known + 1
        assert maps(stub, other, a) == known
    assert maps(stub, b, a) == known


def test_maps_are_another_drivers(tmp_path: Path, a: moekern.ScaledTensor) -> None:
    b, found = weights(256), []
    for _ in range(2):
        with stub_driver.build(tmp_path).used() as stub:
            found.append((maps(stub, b, a), maps(stub, b, a)))
    assert found[0] == found[1] and found[0][0] == found[0][1] + 1


def test_few_maps_are_kept(stub: Stub, a: moekern.ScaledTensor) -> None:
    """More weights than a model has: what is remembered does not grow for ever."""
    many = 20_000
    data, scale = torch.ones(many + 128, 128).to(torch.float8_e4m3fn), torch.ones(1, 1)
    first = moekern.ScaledTensor(data[:128], scale, (128, 128))
    known = maps(stub, first, a) - 1
    assert maps(stub, first, a) == known
    for i in range(1, many):
        gemm(moekern.ScaledTensor(data[i : i + 128], scale, (128, 128)), a)
    assert maps(stub, first, a) == known + 1
    assert maps(stub, first, a) == known


# ---- choices ------------------------------------------------------------------------------------------


def test_python_is_asked_once_for_a_shape(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    from moekern.backends.cuda import hopper

    asked: list[tuple[int, ...]] = []
    plan = hopper.tile_plan

    def noting(*given: int) -> tuple[int, ...]:
        asked.append(given)
        return plan(*given)

    monkeypatch.setattr(hopper, "tile_plan", noting)
    a, b = moekern.per_token_cast_to_fp8(torch.ones(333, 128)), weights(1111)
    for _ in range(3):
        gemm(b, a)
    assert len(asked) == 1 and {333, 1111, 128} <= set(asked[0])


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda *given: (128, 128), "returned 2 integers; it has to return "),
        (lambda *given: (7, 7, 0, 1), "tiles of 7 x 7, which no kernel has"),
        (lambda *given: 1 // 0, "division"),
    ],
)
def test_a_wrong_answer_is_an_error(stub: Stub, monkeypatch: pytest.MonkeyPatch, answer, said: str) -> None:
    from moekern.backends.cuda import hopper

    monkeypatch.setattr(hopper, "tile_plan", answer)
    rows = 400 + len(said)  # a shape that no test asks for
    with pytest.raises((ValueError, ZeroDivisionError), match=said):
        gemm(weights(131), moekern.per_token_cast_to_fp8(torch.ones(rows, 128)))
