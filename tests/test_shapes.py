"""Shapes that nobody thought of, near multiples of every tile, exact to the last bit."""

from __future__ import annotations

from typing import Any

import executors
import pytest
import torch
from hypothesis import example, given, note, settings
from hypothesis import strategies as st
from test_kernels import run_gemm

import moekern
from moekern import fused_experts
from moekern.scaled import DTYPES
from moekern.testing import cases, expert_cases
from moekern.testing.cases import Gemm
from moekern.testing.expert_cases import FORMS, Experts
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
@settings(max_examples=40)
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


def layer(experts: int, chosen: int, **fields: Any) -> Experts:
    return Experts(experts=experts, top_k=min(experts, chosen), values="integers", **fields)


layers = st.builds(
    layer,
    experts=st.integers(1, 7),
    chosen=st.integers(0, 4),
    tokens=near(1, 6, 8, 16, 32, most=70),
    hidden=near(8, 32, 64, 128, most=300).map(lambda size: max(size, 2)),
    intermediate=near(8, 32, 64, 128, most=300).map(lambda size: max(size, 1)),
    x=st.sampled_from(["bf16", "f16", "f32", *DTYPES]),
    weight=FORMATS,
    quantize=st.booleans(),
    block=st.sampled_from([(128, 128), (1, 128), (1, 0), (0, 0)]),
    scale=st.sampled_from(["f32", "ue8m0"]),
    form=st.sampled_from(FORMS),
    activation=st.sampled_from(["swiglu", "gelu", "gelu_tanh"]),
    limit=st.sampled_from([None, 64.0]),
    on_input=st.booleans(),
    shared=st.integers(0, 2),
    shared_size=st.sampled_from([None, 1, 130]),
    mapped=st.booleans(),
    routing=st.sampled_from(["even", "skewed", "one", "skips", "nothing"]),
    index=st.sampled_from(["i32", "i64"]),
    out=st.sampled_from([None, "f32", "bf16"]),
    layout_x=LAYOUTS,
    layout_w=LAYOUTS,
    layout_out=LAYOUTS,
)


@executors.of(fused_experts)
@settings(max_examples=15)
@given(case=layers)
def test_any_layer(executor: executors.Executor, case: Experts) -> None:
    if executor.absent:
        pytest.skip(f"{executor.name} {executor.absent}")
    note(str(case))
    p = expert_cases.operands(case)
    out = expert_cases.output(case)
    try:
        executor(*p.arguments, **p.options, out=out)
    except pytest.skip.Exception:
        return
    assert cases.only_written(out), "wrote outside of out"
    expected = fused_experts.reference(*p.arguments, **p.options).to(torch.float32).to(out.dtype)
    assert torch.equal(out, expected)
