"""The Triton kernels on the cases and checks of the CPU's, in the interpreter (interpreted.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import interpreted
import pytest
import test_experts
import test_gate
import test_grouped
import test_kernels
import test_permute
import torch
from executors import Check, Executor, problems

import moekern
from moekern import GroupedLayout, ScaledTensor
from moekern.backends._triton.targets import TARGETS
from moekern.backends._triton.tiles import Tiles
from moekern.op import Op
from moekern.testing import cases, expert_cases, grouped_cases, routing_cases
from moekern.testing.numerics import check_bound, check_rms, gemm_oracle

LISTS: list[tuple[Op, list[Any], Check]] = [
    (moekern.fp8_gemm_nt, cases.GEMM, test_kernels.test_gemm),
    *(
        (op, [case for case in found if case.op is op], test_grouped.test_grouped)
        for op, found in (
            (moekern.m_grouped_fp8_gemm_nt_contiguous, grouped_cases.M_GROUPED),
            (moekern.m_grouped_fp8_gemm_nt_masked, grouped_cases.M_GROUPED),
            (moekern.k_grouped_fp8_gemm_tn_contiguous, grouped_cases.K_GROUPED),
        )
    ),
    (moekern.fused_experts, expert_cases.EXPERTS, test_experts.test_experts),
    *((op, [c for c in cases.CAST if c.op == op.name], test_kernels.test_cast) for op in test_kernels.CASTS),
    (moekern.dequantize, cases.DEQUANTIZE, test_kernels.test_dequantize),
    (moekern.moe_gate, routing_cases.GATE, test_gate.test_gate),
    (moekern.moe_permute, routing_cases.PERMUTE, test_permute.test_permute),
    (moekern.moe_unpermute, routing_cases.UNPERMUTE, test_permute.test_unpermute),
]


@pytest.mark.parametrize(("executor", "check", "case"), problems(LISTS, interpreted.executors))
def test_interpreted(executor: Executor, check: Check, case: Any) -> None:
    check(executor, case)


@pytest.mark.parametrize("factor", [1.0, 1e30], ids=["", "sums overflow"])
@pytest.mark.parametrize("groups", [None, "contiguous", "masked"])
@pytest.mark.skipif(interpreted.absent() is not None, reason=str(interpreted.absent()))
def test_operands_by_tensor_descriptors(groups: str | None, factor: float) -> None:
    """On aligned operands, which the cases above are not: edges of rows, columns and k, and what a repair does."""
    from moekern.backends._triton import gemm, grouped

    g = torch.Generator().manual_seed(0)
    target, tiles = replace(TARGETS["sm_90"], processors=3), Tiles(64, 128, 4, 3, descriptors=True, specialised=True)
    a = moekern.per_token_cast_to_fp8(torch.randn(160, 400, generator=g))
    b = moekern.per_block_cast_to_fp8(torch.randn(768, 400, generator=g))
    a, b = (ScaledTensor(x.data, x.scale * factor, x.block) for x in (a, b))
    b.scale[3:] = 1e-3  # other columns and groups stay finite
    op: Op = moekern.fp8_gemm_nt
    call: tuple[Any, ...] = (a, b)
    plan: Any = gemm.gemm
    out = cases.place(torch.full((160, 768), torch.nan), "padded")
    if groups:
        b = ScaledTensor(b.data.view(2, 384, 400), b.scale.view(2, 3, -1), b.block)
        layout = GroupedLayout.from_counts([70, 33], 16, 160)
        if groups == "masked":
            a = ScaledTensor(a.data.view(2, 80, 400), a.scale.view(2, 80, -1), a.block)
            layout = GroupedLayout.from_masked([70, 0], 80)
        op = moekern.m_grouped_fp8_gemm_nt_masked if groups == "masked" else moekern.m_grouped_fp8_gemm_nt_contiguous
        call, plan = (a, b, layout), grouped.m_grouped
        out = torch.full((*a.shape[:-1], 384), grouped_cases.UNTOUCHED)
    prepared = op.prepare(*call, out=out)
    launches = plan(target, lambda target, shape: tiles if shape.described else pytest.fail("not described"), *prepared)
    assert [launch.constants["TILES"] for launch in launches] == [True, False]
    with interpreted.interpreter():
        for launch in launches:
            launch.run()
    if groups:
        oracle = grouped_cases.m_grouped_oracle(op, *call)
        assert grouped_cases.untouched(out, call[2])
        out = grouped_cases.owned(out, call[2])
    else:
        oracle = gemm_oracle(op, *call)
        assert cases.only_written(out)
    check_bound(out, oracle)
    check_rms(out, oracle)
