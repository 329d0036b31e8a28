"""Shapes that nobody thought of, near multiples of every tile, exact to the last bit."""

from __future__ import annotations

import executors
import pytest
from hypothesis import example, given, note, settings
from hypothesis import strategies as st
from test_kernels import run_gemm

import moekern
from moekern.scaled import DTYPES
from moekern.testing.cases import Gemm
from moekern.testing.numerics import check_exact


def near(*steps: int, most: int) -> st.SearchStrategy[int]:
    """Integers within two of a multiple of one of the steps."""
    return st.builds(
        lambda step, times, offset: min(max(step * times + offset, 0), most),
        st.sampled_from(steps), st.integers(0, 4), st.integers(-2, 2),
    )  # fmt: skip


LAYOUTS = st.sampled_from(["rows", "padded", "columns", "every_other"])
FORMATS = st.sampled_from(sorted(DTYPES))

problems = st.builds(
    Gemm,
    m=near(1, 6, 8, 12, 14, 16, 32, most=70),
    n=near(1, 8, 16, 32, 64, 128, most=300),
    k=near(1, 8, 32, 64, 128, most=520),
    a=st.sampled_from(["bf16", "f16", "f32", *DTYPES]),
    b=FORMATS,
    out=st.sampled_from([None, "f32", "bf16", "f16"]),
    bias=st.sampled_from([None, "f32", "bf16"]),
    c=st.sampled_from([None, "out", "f32"]),
    block_a=st.sampled_from([(1, 128), (1, 0), (0, 0)]),
    block_b=st.sampled_from([(128, 128), (1, 128), (1, 0), (0, 0), (64, 128)]),
    scale=st.sampled_from(["f32", "ue8m0"]),
    layout_a=LAYOUTS,
    layout_b=LAYOUTS,
    layout_out=LAYOUTS,
    values=st.just("integers"),
)


@executors.of(moekern.fp8_gemm_nt)
@settings(max_examples=60)
@given(case=problems)
@example(case=Gemm(0, 0, 0, values="integers"))
def test_any_shape(executor: executors.Executor, case: Gemm) -> None:
    if executor.absent:
        pytest.skip(f"{executor.name} {executor.absent}")
    note(str(case))
    try:
        result, oracle = run_gemm(executor, case)
    except pytest.skip.Exception:  # this example only: another may be taken
        return
    check_exact(result, oracle)
