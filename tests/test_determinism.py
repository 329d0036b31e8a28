"""The same bits: for any number of threads, twice in a row, whatever the other rows are, in any float mode."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import executors
import pytest
import torch

import moekern
from moekern.scaled import ScaledTensor
from moekern.testing import cases
from moekern.testing.cases import Gemm

# Enough work for five threads, few enough rows for every kernel; and tasks that do not divide evenly.
THREADED = (
    Gemm(1, 2100, 640),
    Gemm(3, 1030, 777, a="e4m3fn", out="f32"),
    Gemm(16, 530, 1160, a="f32", block_b=(1, 128)),
)
CASTS = (
    moekern.per_token_cast_to_fp8,
    moekern.per_block_cast_to_fp8,
    moekern.per_channel_cast_to_fp8,
    moekern.silu_mul_cast_to_fp8,
)


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


@executors.of(moekern.fp8_gemm_nt)
@pytest.mark.parametrize("case", THREADED, ids=str)
def test_gemm_for_any_number_of_threads(executor: executors.Executor, case: Gemm) -> None:
    operands = cases.gemm_operands(case)
    first = None
    for threads in executor.threads:
        with moekern.use(num_threads=threads):
            result = executor(operands.a, operands.b)
        first = result if first is None else first
        assert same(result, first), f"{threads} threads give other bits than one"


@executors.of(*CASTS)
def test_cast_for_any_number_of_threads(executor: executors.Executor) -> None:
    x = torch.randn(700, 1300, generator=torch.Generator().manual_seed(0))
    first = None
    for threads in executor.threads:
        with moekern.use(num_threads=threads):
            q, scale = executor(x)
        first = (q, scale) if first is None else first
        assert same(q, first[0]) and same(scale, first[1]), f"{threads} threads give other bits than one"


@executors.of(moekern.dequantize)
def test_dequantize_for_any_number_of_threads(executor: executors.Executor) -> None:
    x = moekern.per_block_cast_to_fp8(torch.randn(700, 1300, generator=torch.Generator().manual_seed(0)))
    results = []
    for threads in executor.threads:
        with moekern.use(num_threads=threads):
            results.append(executor(x))
    assert all(same(result, results[0]) for result in results)


def rows_of(x: torch.Tensor | ScaledTensor, first: int, last: int) -> torch.Tensor | ScaledTensor:
    if isinstance(x, ScaledTensor):
        return ScaledTensor(x.data[first:last], x.scale[first:last], x.block)
    return x[first:last]


@executors.of(moekern.fp8_gemm_nt)
@pytest.mark.parametrize("a", ["bf16", "f32", "e4m3fn"])
@pytest.mark.parametrize("m", [7, 16, 61])
def test_a_row_does_not_depend_on_the_others(executor: executors.Executor, m: int, a: str) -> None:
    """Every row alone, every row among others, and among rows of NaN and of enormous values."""
    operands = cases.gemm_operands(Gemm(m, 150, 1300, a=a, out="f32"))
    together = executor(operands.a, operands.b, out_dtype=torch.float32)
    for i in range(m):
        alone = executor(rows_of(operands.a, i, i + 1), operands.b, out_dtype=torch.float32)
        assert same(alone[0], together[i]), f"row {i} of {m} has other bits than alone"
    if isinstance(operands.a, ScaledTensor):
        hostile = ScaledTensor(operands.a.data.clone(), operands.a.scale.clone(), operands.a.block)
        hostile.scale[::2] = torch.tensor([torch.nan, 1e38])[torch.arange((m + 1) // 2) % 2].unsqueeze(1)
    else:
        hostile = operands.a.clone()
        hostile[::2] = torch.tensor([torch.nan, 3e38])[torch.arange((m + 1) // 2) % 2].to(hostile.dtype).unsqueeze(1)
    among = executor(hostile, operands.b, out_dtype=torch.float32)
    assert same(among[1::2], together[1::2]), "rows change when their neighbours do"


@pytest.mark.parametrize("a", ["bf16", "e4m3fn"])
def test_batch_invariant(a: str) -> None:
    """`use(batch_invariant=True)`: a row has the same bits at every number of rows."""
    operands = cases.gemm_operands(Gemm(70, 150, 700, a=a, out="f32"))
    with moekern.use(batch_invariant=True):
        together = moekern.fp8_gemm_nt(operands.a, operands.b)
        for m in (1, 2, 3, 7, 8, 15, 16, 17, 33, 64):
            assert same(moekern.fp8_gemm_nt(rows_of(operands.a, 70 - m, 70), operands.b), together[70 - m :])


@contextmanager
def flushing_denormals() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def rounding_up() -> Iterator[None]:
    upward = {"x86_64": 0x800, "aarch64": 0x400000}.get(platform.machine())
    if upward is None:
        pytest.skip(f"FE_UPWARD of {platform.machine()} is not known here")
    libm = ctypes.CDLL(None)
    try:
        assert libm.fesetround(upward) == 0
        yield
    finally:
        libm.fesetround(0)


@pytest.mark.parametrize("mode", [flushing_denormals, rounding_up])
@executors.of(moekern.fp8_gemm_nt)
@pytest.mark.parametrize("m", [1, 20])
def test_gemm_in_any_float_mode(executor: executors.Executor, m: int, mode: object) -> None:
    """FP8 subnormals, results below f32's normal range, and halves that round up only when asked to."""
    for case in (
        Gemm(m, 130, 300, a="f32", values="codes"),
        Gemm(m, 130, 300, a="f32", values="tiny"),
        Gemm(m, 900, 700),
    ):
        operands = cases.gemm_operands(case)
        with moekern.use(num_threads=2):
            expected = executor(operands.a, operands.b)
            with mode():  # type: ignore[operator]
                got = executor(operands.a, operands.b)
        assert same(got, expected), f"other bits for {case}"


@pytest.mark.parametrize("mode", [flushing_denormals, rounding_up])
@executors.of(*CASTS)
def test_cast_in_any_float_mode(executor: executors.Executor, mode: object) -> None:
    x = torch.randn(40, 600, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 1e-4, 1e-38, 1e-42]
    ).repeat(150)
    q, scale = executor(x)
    with mode():  # type: ignore[operator]
        got, got_scale = executor(x)
    assert same(got, q) and same(got_scale, scale)
