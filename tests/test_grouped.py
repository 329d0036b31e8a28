"""Grouped products: every kernel on every case, and what holds for all of them."""

from __future__ import annotations

from typing import Any

import executors
import pytest
import torch

import moekern
from moekern.testing import cases, grouped_cases
from moekern.testing.grouped_cases import KGrouped, MGrouped
from moekern.testing.numerics import check_bound, check_exact, check_rms

M_OPS = (moekern.m_grouped_fp8_gemm_nt_contiguous, moekern.m_grouped_fp8_gemm_nt_masked)
OPS = (*M_OPS, moekern.k_grouped_fp8_gemm_tn_contiguous)


def run_m_grouped(executor: executors.Executor, case: MGrouped) -> tuple[torch.Tensor, Any]:
    """The rows that one kernel writes on one case, and what they should be."""
    a, b, layout = grouped_cases.m_grouped_operands(case)
    out = grouped_cases.m_grouped_output(case, layout)
    oracle = grouped_cases.m_grouped_oracle(executor.op, a, b, layout)
    executor(a, b, layout, out)
    assert cases.only_written(out), "wrote outside of out"
    assert grouped_cases.untouched(out, layout), "wrote to rows that belong to no group"
    return grouped_cases.owned(out, layout), oracle


def run_k_grouped(executor: executors.Executor, case: KGrouped) -> tuple[torch.Tensor, Any]:
    a, b, layout, c, out = grouped_cases.k_grouped_operands(case)
    oracle = grouped_cases.k_grouped_oracle(a, b, layout, c)
    executor(a, b, layout, c, out)
    assert cases.only_written(out), "wrote outside of out"
    return out.flatten(0, 1), oracle


def problems(*ops: moekern.Op) -> list[tuple[executors.Executor, Any]]:
    found = (*grouped_cases.M_GROUPED, *grouped_cases.K_GROUPED)
    return [(e, case) for e in executors.executors(*ops) for case in found if case.op is e.op]


@pytest.mark.parametrize(("executor", "case"), problems(*OPS), ids=str)
def test_grouped(executor: executors.Executor, case: Any) -> None:
    run: Any = run_m_grouped if isinstance(case, MGrouped) else run_k_grouped
    if (exact := grouped_cases.exact(case)) is not None:
        check_exact(*run(executor, exact))
    result, oracle = run(executor, case)
    check_bound(result, oracle)
    check_rms(result, oracle)
