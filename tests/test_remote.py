"""The machinery that runs kernels of other CPUs: what it finds, how it fails, that threads change no bit."""

from __future__ import annotations

import pytest
import remote
import torch

import moekern
from moekern import fp8_gemm_nt
from moekern.testing import cases

needs_aarch64 = pytest.mark.skipif(bool(remote.why_not("aarch64")), reason=f"aarch64: {remote.why_not('aarch64')}")
each_runner = pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=pytest.mark.skipif(bool(remote.why_not(name)), reason=f"{name}: {remote.why_not(name)}")
        )
        for name in remote.LAUNCHERS
    ],
)


def on_cpu(cpu: str) -> remote.Runner:
    return remote.Runner("aarch64", ["qemu-aarch64-static", "-cpu", cpu, str(remote.program("aarch64"))])


@needs_aarch64
@pytest.mark.parametrize(
    ("cpu", "features"),
    [
        ("cortex-a72", {"neon"}),
        ("max,sve=off", {"neon", "neon_bf16"}),
        ("max,sve-default-vector-length=16", {"neon", "neon_bf16"}),
        ("max,sve-default-vector-length=32", {"neon", "neon_bf16", "sve_256"}),
        ("max,sve-default-vector-length=64", {"neon", "neon_bf16"}),
        ("a64fx", {"neon"}),
    ],
)
def test_features(cpu: str, features: set[str]) -> None:
    runner = on_cpu(cpu)
    assert runner.device.features == features
    runner.close()


def problem(m: int = 33, n: int = 300, k: int = 520) -> tuple:
    operands = cases.gemm_operands(cases.Gemm(m, n, k))
    return fp8_gemm_nt.prepare(operands.a, operands.b)


@needs_aarch64
def test_absent_feature_is_refused() -> None:
    runner = on_cpu("cortex-a72")
    kernel = next(k for k in runner.kernels(fp8_gemm_nt) if k.name == "cpu.sve_256")
    assert kernel.why_not(runner.device, *problem()) == "needs sve_256"
    with pytest.raises(RuntimeError, match=r"cpu\.sve_256 needs sve_256"):
        kernel.run(*problem())
    runner.close()


@each_runner
@pytest.mark.parametrize("m", [3, 70])
def test_threads_change_no_bit(name: str, m: int) -> None:
    runner = remote.runner(name)
    for kernel in runner.kernels(fp8_gemm_nt):
        call = problem(m)
        if kernel.why_not(runner.device, *call):
            continue
        results = []
        for threads in (1, 2, 3, 3):
            call[4].fill_(torch.nan)
            with moekern.use(num_threads=threads):
                kernel.run(*call)
            results.append(call[4].clone())
        assert all(torch.equal(r, results[0]) for r in results), kernel.name


@each_runner
@pytest.mark.parametrize("operand", ["a", "b", "b.scale", "out"])
def test_a_stray_access_is_a_crash(name: str, operand: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the last element missing from an operand's memory, every kernel leaves it, dies, and is said to."""

    class Short(remote._Request):
        def _add_matrix(self, name: str, tensor: torch.Tensor, *rest: object) -> None:
            super()._add_matrix(name, tensor, *rest)
            if name == operand:
                memory = self.memories[-1]
                memory.view = memory.view[: -tensor.element_size()]
                memory.bytes = memory.view.numel()

    runner = remote.runner(name)
    for kernel in runner.kernels(fp8_gemm_nt):
        call = problem(3, 40, 133)
        if kernel.why_not(runner.device, *call):
            continue
        with monkeypatch.context() as patch:
            patch.setattr(remote, "_Request", Short)
            with pytest.raises(remote.Crash, match=f"{kernel.name}: .*SIG"):
                kernel.run(*call)
        kernel.run(*call)
        assert call[4].isfinite().all()


@each_runner
def test_lists_the_ops_of_this_build(name: str) -> None:
    for op in moekern.ops.OPS:
        assert any(kernel.lacks(remote.runner(name).device) is None for kernel in remote.runner(name).kernels(op)), (
            op.name
        )
