"""Which kernel takes a call: order, features, refusals, moekern.use and the environment."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch

import moekern
from moekern import Device, Kernel, NotSupported, Op, backends
from moekern import op as dispatcher
from moekern.ops import OPS
from moekern.policy import from_environment

BARE = Device("cpu", "x86_64")
FULL = Device("cpu", "x86_64", frozenset().union(*(k.needs for op in OPS for k in op.kernels)))


def spec(x: Any, out: Any = None) -> Any:
    """out = x"""
    return x


def toy() -> Op:
    """An op with three kernels that log their name: one for wide devices, one for few rows, one for all."""
    op = Op(spec, lambda x, out=None: (x, [] if out is None else out), "out")

    def kernel(name: str, **options: Any) -> Kernel:
        def run(x: Any, out: Any) -> None:
            out.append(name)

        return Kernel(f"cpu.{name}", run, "cpu", **options)

    op.add(kernel("wide", needs=frozenset({"wide", "fast"})))
    op.add(kernel("few", refuses=lambda x, out: f"takes at most 4 rows, not {x}" if x > 4 else None, for_few_rows=True))
    op.add(kernel("any"))
    return op


def weights(n: int = 130, k: int = 200) -> moekern.ScaledTensor:
    return moekern.per_block_cast_to_fp8(torch.randn(n, k))


def script(body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MOEKERN_")}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(body)],
        capture_output=True, text=True, timeout=60, env={**clean, **environment}, check=False,
    )  # fmt: skip


def test_the_best_kernel_that_can_is_selected() -> None:
    op, wide = toy(), Device("cpu", "x86_64", frozenset({"wide", "fast", "more"}))
    assert op.select(wide, 1, []).name == "cpu.wide"
    assert op.select(BARE, 4, []).name == "cpu.few"
    assert op.select(BARE, 5, []).name == "cpu.any"
    assert op.select(Device("cpu", "x86_64", frozenset({"wide"})), 5, []).name == "cpu.any"


def test_reasons() -> None:
    op = toy()
    wide, few, last = op.kernels
    assert wide.why_not(BARE, 1, []) == "needs fast, wide"
    assert wide.why_not(Device("cpu", "x86_64", frozenset({"wide"})), 1, []) == "needs fast"
    assert few.why_not(BARE, 9, []) == "takes at most 4 rows, not 9"
    assert last.why_not(Device("cuda", "sm_90"), 1, []) == "runs on cpu, not cuda"
    assert last.why_not(BARE, 1, []) is None
    assert op.explain(BARE, 9, []).splitlines() == [
        "spec on cpu (x86_64): cpu.any",
        "  cpu.wide: needs fast, wide",
        "  cpu.few: takes at most 4 rows, not 9",
        "  cpu.any: chosen",
    ]


def test_nothing_is_selected_silently() -> None:
    """No kernel means NotSupported with every kernel's reason, never a fallback."""
    with pytest.raises(NotSupported) as caught:
        toy().select(Device("cuda", "sm_90"), 1, [])
    assert [line.strip() for line in str(caught.value).splitlines()] == [
        "spec on cuda (sm_90): no kernel",
        *(f"cpu.{name}: runs on cpu, not cuda" for name in ("wide", "few", "any")),
    ]


def test_a_kernel_has_the_parameters_of_its_spec() -> None:
    op = toy()
    with pytest.raises(TypeError, match=r"cpu\.odd: parameters \('x', 'output'\), but spec has \('x', 'out'\)"):
        op.add(Kernel("cpu.odd", lambda x, output: None, "cpu"))
    with pytest.raises(ValueError, match=r"already has a kernel named cpu\.any"):
        op.add(Kernel("cpu.any", lambda x, out: None, "cpu"))


def test_a_kernel_added_later_is_seen() -> None:
    op = toy()
    op.select(BARE, 9, [])
    op.add(Kernel("cpu.late", lambda x, out: None, "cpu"))
    assert "cpu.late: would do" in op.explain(BARE, 9, [])


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_op_runs_on_every_cpu(op: Op) -> None:
    """Pretend devices: a CPU without any feature has a kernel, and every feature brings better ones first."""
    bare, full = (
        [k.name for k in op.candidates(BARE, dispatcher.Policy())],
        [k.name for k in op.candidates(FULL, dispatcher.Policy())],
    )
    assert bare and set(bare) <= set(full)
    assert full == [k.name for k in op.kernels if k.kind == "cpu"]
    assert len({k.name for k in op.kernels}) == len(op.kernels)
    assert all(k.name.startswith(f"{k.kind}.") for k in op.kernels)
    assert [k for k in op.kernels if k.kind == "cpu"][-1].needs == frozenset()


def test_no_kernel_for_such_scales() -> None:
    """Scales of 1 x 32 weights: refused by name of kernel, not computed wrongly."""
    b = moekern.ScaledTensor(weights().data, torch.ones(130, 7), (1, 32))
    with pytest.raises(NotSupported) as caught:
        moekern.fp8_gemm_nt(torch.randn(3, 200), b)
    for kernel in moekern.fp8_gemm_nt.kernels:
        assert f"  {kernel.name}: " in str(caught.value)


def test_explain_names_the_kernel_that_runs() -> None:
    assert moekern.explain(moekern.fp8_gemm_nt, torch.randn(3, 200), weights()).count("chosen") == 1
    with moekern.use(kernel="fp8_gemm_nt=cpu.scalar"):
        text = moekern.explain(moekern.fp8_gemm_nt, torch.randn(3, 200), weights())
    assert text.splitlines()[0].endswith(": cpu.scalar") and "cpu.scalar: chosen" in text
    assert "chosen" not in text.replace("cpu.scalar: chosen", "") and "would do" not in text
    assert "left out by moekern.use or the environment" in text or len(moekern.fp8_gemm_nt.kernels) == 1


# ---- moekern.use -------------------------------------------------------------------------------------


def test_use_is_undone() -> None:
    before = dispatcher.policy
    with moekern.use(kernel="fp8_gemm_nt=cpu.scalar"):
        with moekern.use(kernel={"dequantize": "cpu.scalar"}, num_threads=2):
            assert dispatcher.policy.forced("fp8_gemm_nt") == dispatcher.policy.forced("dequantize") == "cpu.scalar"
            assert dispatcher.policy.num_threads == 2
        assert dispatcher.policy.forced("dequantize") is None
        assert dispatcher.policy.num_threads == before.num_threads
    assert dispatcher.policy == before
    with pytest.raises(KeyError), moekern.use(batch_invariant=True):
        raise KeyError
    assert dispatcher.policy == before


def test_use_is_process_wide_without_with() -> None:
    before = moekern.use(kernel="fp8_gemm_nt=cpu.scalar")
    try:
        assert (
            moekern.explain(moekern.fp8_gemm_nt, torch.randn(3, 200), weights()).splitlines()[0].endswith("cpu.scalar")
        )
    finally:
        before.__exit__(None, None, None)
    assert dispatcher.policy.forced("fp8_gemm_nt") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tpu"}, "backend is 'tpu'"),
        ({"kernel": "fp8_gemm_nt"}, "kernel of fp8_gemm_nt is ''"),
        ({"kernel": "fp8_gemm_nt=cpu.nonsense"}, "kernel of fp8_gemm_nt is 'cpu.nonsense'; it is one of cpu."),
        ({"kernel": "nonsense=cpu.scalar"}, "kernel's op is 'nonsense'"),
        ({"kernel": {"nonsense": "cpu.scalar"}}, "kernel's op is 'nonsense'"),
        ({"num_threads": 0}, "num_threads is 0"),
        ({"num_threads": -1}, "num_threads is -1"),
    ],
    ids=str,
)
def test_use_refuses(options: dict[str, Any], message: str) -> None:
    before = dispatcher.policy
    with pytest.raises(ValueError) as caught:
        moekern.use(**options)
    assert message in str(caught.value) and dispatcher.policy == before


def test_a_forced_backend_that_is_not_there_raises() -> None:
    with (
        moekern.use(backend="cuda"),
        pytest.raises(NotSupported, match="backend cuda is forced; the operands are on cpu"),
    ):
        moekern.fp8_gemm_nt(torch.randn(3, 200), weights())


def test_a_forced_kernel_without_its_features_raises() -> None:
    op, kernel = moekern.fp8_gemm_nt, next(k for k in moekern.fp8_gemm_nt.kernels if k.needs)
    reason = f"forced kernel {kernel.name} needs {', '.join(sorted(kernel.needs))}"
    with moekern.use(kernel={op.name: kernel.name}), pytest.raises(NotSupported, match=reason):
        op.candidates(BARE, dispatcher.policy)


def test_a_forced_kernel_that_refuses_raises() -> None:
    few = next(k for k in moekern.fp8_gemm_nt.kernels if k.for_few_rows and k.lacks(moekern.devices()[0]) is None)
    with moekern.use(kernel={"fp8_gemm_nt": few.name}), pytest.raises(NotSupported, match=few.name):
        moekern.fp8_gemm_nt(torch.randn(500, 200), weights())


def test_batch_invariance_leaves_out_kernels_for_few_rows() -> None:
    with moekern.use(batch_invariant=True):
        text = moekern.explain(moekern.fp8_gemm_nt, torch.randn(1, 200), weights())
    chosen = text.splitlines()[0].rsplit(" ", 1)[1]
    assert not next(k for k in moekern.fp8_gemm_nt.kernels if k.name == chosen).for_few_rows


# ---- the environment ---------------------------------------------------------------------------------

CHOSEN = (
    "import torch, moekern; print(moekern.explain(moekern.dequantize, ({}, torch.ones(1, 1))).splitlines()[0])".format(
        "torch.zeros(2, 2).to(torch.float8_e4m3fn)"
    )
)


def test_environment_forces_a_kernel() -> None:
    done = script(CHOSEN, MOEKERN_KERNEL="dequantize=cpu.scalar,fp8_gemm_nt=cpu.scalar")
    assert done.returncode == 0 and done.stdout.strip().endswith(": cpu.scalar"), done.stderr


def test_environment_forces_a_backend() -> None:
    assert script(CHOSEN, MOEKERN_BACKEND="cpu").returncode == 0
    done = script(CHOSEN, MOEKERN_BACKEND="cuda")
    assert "backend cuda is forced" in done.stderr


def test_environment_sets_threads_and_log() -> None:
    body = "from moekern import op; print(op.policy.num_threads, op.log.level)"
    assert script(body, MOEKERN_NUM_THREADS="3", MOEKERN_LOG="debug").stdout.split() == ["3", str(logging.DEBUG)]
    assert script(body).stdout.split() == ["None", "0"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MOEKERN_KERNEL", "dequantize=cpu.nonsense"),
        ("MOEKERN_KERNEL", "nonsense"),
        ("MOEKERN_BACKEND", "tpu"),
        ("MOEKERN_NUM_THREADS", "many"),
        ("MOEKERN_NUM_THREADS", "0"),
        ("MOEKERN_LOG", "loud"),
    ],
)
def test_environment_refuses(name: str, value: str) -> None:
    before = dispatcher.policy
    with pytest.raises(ValueError, match=value.split("=")[-1]):
        from_environment({name: value})
    assert dispatcher.policy == before


def test_environment_refuses_at_import() -> None:
    done = script("import moekern", MOEKERN_BACKEND="tpu")
    assert done.returncode != 0 and "backend is 'tpu'" in done.stderr.splitlines()[-1]


# ---- backends ----------------------------------------------------------------------------------------


def test_every_backend_is_a_device_or_a_reason() -> None:
    assert tuple(backends.loaded) == backends.NAMES
    for backend in backends.loaded.values():
        assert bool(backend.devices) != bool(backend.absent)
    assert moekern.devices()[0].kind == "cpu" and moekern.devices()[0].features <= FULL.features | {"avx512_vbmi"}


def test_a_broken_vendor_package_is_a_reason(tmp_path: Any) -> None:
    (tmp_path / "torch_npu.py").write_text("raise OSError('libascendcl.so: cannot open shared object file')")
    done = script("from moekern import backends; print(backends.loaded['ascend'].absent)", PYTHONPATH=str(tmp_path),
                  TORCH_DEVICE_BACKEND_AUTOLOAD="0")  # fmt: skip
    assert done.stdout.strip() == "OSError: libascendcl.so: cannot open shared object file", done.stderr
