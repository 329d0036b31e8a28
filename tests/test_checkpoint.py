"""Weights are used where they lie, also in a memory-mapped file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import moekern

MIB = 1 << 20


def private_bytes() -> int:
    """Resident memory that is the process's own: what a mapped file holds is not counted."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("no RssAnon in /proc/self/status")


@pytest.mark.parametrize("m", [1, 7, 300])
def test_a_mapped_checkpoint_is_neither_copied_nor_repacked(tmp_path: Path, m: int) -> None:
    n, k = 6144, 8192
    weight = torch.randn(n, k).to(torch.float8_e4m3fn)
    scale = torch.rand(n // 128, k // 128)
    save_file({"w.weight": weight, "w.weight_scale_inv": scale}, tmp_path / "model.safetensors")
    a = torch.randn(m, k, dtype=torch.bfloat16)
    out = torch.zeros(m, n, dtype=torch.bfloat16)
    threads = 2
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file, moekern.use(num_threads=threads):
        mapped = moekern.ScaledTensor(file.get_tensor("w.weight"), file.get_tensor("w.weight_scale_inv"))
        before = private_bytes()
        moekern.fp8_gemm_nt(a, mapped, out=out)
        grown = private_bytes() - before
    assert grown < threads * 16 * MIB < n * k, (
        f"{grown / MIB:.1f} MiB more after a product with {n * k / MIB:.0f} MiB of weights"
    )
    assert torch.equal(out, moekern.fp8_gemm_nt(a, (weight, scale)))
