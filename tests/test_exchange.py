"""A torch without the DLPack exchange table (before 2.10) is read through Python, with the same results."""

from __future__ import annotations

import subprocess
import sys

WITHOUT_THE_TABLE = """
import torch
del torch.Tensor.__dlpack_c_exchange_api__
import moekern
from moekern import _C
assert not _C.uses_exchange_table()
torch.manual_seed(0)
x, weight = torch.randn(5, 200).bfloat16(), torch.randn(70, 200)
w = moekern.per_block_cast_to_fp8(weight)
reference = moekern.per_block_cast_to_fp8.reference(weight, "e4m3fn", False)
assert torch.equal(w.data.view(torch.uint8), reference.data.view(torch.uint8)) and torch.equal(w.scale, reference.scale)
out = moekern.fp8_gemm_nt(x, w, out_dtype=torch.float32)
exact = moekern.fp8_gemm_nt.reference(x, w)
assert out.dtype == torch.float32 and (out - exact).abs().max() < 1e-4 * exact.abs().max()
assert moekern.dequantize(w, out_dtype=torch.bfloat16).dtype == torch.bfloat16
stack = moekern.ScaledTensor(w.data.expand(2, 70, 200), w.scale.expand(2, *w.scale.shape))
layout = moekern.GroupedLayout.from_masked([3, 5], 5)
both = moekern.m_grouped_fp8_gemm_nt_masked(x.expand(2, 5, 200), stack, layout, out_dtype=torch.float32)
assert torch.equal(both[1], out) and torch.equal(both[0, :3], out[:3]) and (both[0, 3:] == 0).all()
down = moekern.per_block_cast_to_fp8(torch.randn(200, 35))
experts = moekern.ExpertWeights([w, w], [down, down])
ids, weights = torch.tensor([[0, 1]] * 5, dtype=torch.int32), torch.rand(5, 2)
workspace = torch.zeros(moekern.fused_experts_workspace(5, 2, experts), dtype=torch.uint8)
mapped = moekern.fused_experts(x, experts, ids, weights, expert_map=torch.tensor([1, 0]), workspace=workspace)
assert torch.equal(mapped, moekern.fused_experts(x, experts, ids.flip(1), weights))
exact = moekern.fused_experts.reference(x, experts, ids, weights)
assert (mapped - exact).abs().max() < 1e-2 * exact.abs().max()
try:
    moekern.fp8_gemm_nt(x[:, :100], w)
except ValueError as error:
    assert "a has shape [5, 100]" in str(error), error
else:
    raise AssertionError("a wrong shape was taken")
"""


def test_tensors_are_read_without_the_exchange_table() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_THE_TABLE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
