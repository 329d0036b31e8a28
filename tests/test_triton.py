"""The Triton kernels on the cases and checks of the CPU's, in the interpreter (interpreted.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import interpreted
import pytest
import test_experts
import test_gate
import test_grouped
import test_kernels
import test_permute
from executors import Executor

import moekern
from moekern.op import Op
from moekern.testing import cases, expert_cases, grouped_cases, routing_cases

Check = Callable[[Executor, Any], None]

# What an op's kernels compute, and every how many cases of its list are taken: on the target that the kernels were
# written for, and on others, which differ in how operands come to the matrix instruction.
LISTS: list[tuple[Op, list[Any], Check, int, int]] = [
    (moekern.fp8_gemm_nt, cases.GEMM, test_kernels.test_gemm, 1, 9),
    *(
        (op, [case for case in found if case.op is op], test_grouped.test_grouped, 1, 9)
        for op, found in (
            (moekern.m_grouped_fp8_gemm_nt_contiguous, grouped_cases.M_GROUPED),
            (moekern.m_grouped_fp8_gemm_nt_masked, grouped_cases.M_GROUPED),
            (moekern.k_grouped_fp8_gemm_tn_contiguous, grouped_cases.K_GROUPED),
        )
    ),
    (moekern.fused_experts, expert_cases.EXPERTS, test_experts.test_experts, 2, 19),
    *((op, [c for c in cases.CAST if c.op == op.name], test_kernels.test_cast, 1, 9) for op in test_kernels.CASTS),
    (moekern.dequantize, cases.DEQUANTIZE, test_kernels.test_dequantize, 1, 9),
    (moekern.moe_gate, routing_cases.GATE, test_gate.test_gate, 1, 9),
    (moekern.moe_permute, routing_cases.PERMUTE, test_permute.test_permute, 1, 9),
    (moekern.moe_unpermute, routing_cases.UNPERMUTE, test_permute.test_unpermute, 1, 9),
]


def problems() -> Iterator[Any]:
    for op, found, check, every, elsewhere in LISTS:
        for executor in interpreted.executors(op):
            step = every if executor.name.startswith("sm_90") else elsewhere
            for case in found[step // 2 :: step]:
                yield pytest.param(executor, check, case, id=f"{executor}-{case}")


@pytest.mark.parametrize(("executor", "check", "case"), problems())
def test_interpreted(executor: Executor, check: Check, case: Any) -> None:
    check(executor, case)
