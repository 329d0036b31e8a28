"""fused_experts: every kernel in every form against the float64 reference, and what has to hold between calls."""

from __future__ import annotations

import functools

import executors
import pytest
import torch

from moekern import fused_experts
from moekern.testing import cases, expert_cases
from moekern.testing.expert_cases import Experts
from moekern.testing.expert_numerics import experts_oracle
from moekern.testing.numerics import GemmOracle, check_bound, check_exact, check_rms


@functools.lru_cache(maxsize=2)  # a case and its exact twin, for all kernels in turn
def problem(case: Experts) -> tuple[expert_cases.Operands, GemmOracle]:
    p = expert_cases.operands(case)
    return p, experts_oracle(*p.arguments, **p.options)


def run(executor: executors.Executor, case: Experts) -> tuple[torch.Tensor, GemmOracle]:
    """The result of one kernel on one case, and what it should be."""
    p, oracle = problem(case)
    out = expert_cases.output(case)
    executor(*p.arguments, **p.options, out=out)
    assert cases.only_written(out), "wrote outside of out"
    return out, oracle


@executors.of(fused_experts)
@pytest.mark.parametrize("case", expert_cases.EXPERTS, ids=str)
def test_experts(executor: executors.Executor, case: Experts) -> None:
    if (exact := expert_cases.exact(case)) is not None:
        check_exact(*run(executor, exact))
    result, oracle = run(executor, case)
    check_bound(result, oracle)
    if case.x == "f32" and not case.quantize:  # elsewhere rms is a matter of which values of h crossed a boundary
        check_rms(result, oracle)
