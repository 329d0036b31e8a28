"""A kernel of one's own: added to an op, chosen, checked against the float64 reference, explained, timed.

    python examples/add_a_kernel.py

An op is a contract, a kernel one way to honour it: a function with the op's parameters, whose output is already
allocated. This one decodes the weights to f32 and leaves the product to torch. It is for many rows, so that decoding
pays, and says so itself. CONTRIBUTING.md has the same for a kernel in C++.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

import moekern
from moekern.op import Kernel
from moekern.scaled import ScaledTensor
from moekern.testing.numerics import check_bound, check_rms, gemm_oracle

NAME, FEWEST_ROWS = "cpu.decode_then_torch", 64


def run(a: Any, b: ScaledTensor, c: Any, bias: Any, out: torch.Tensor, out_dtype: torch.dtype) -> None:
    """out = cast(a b^T + bias + c): `prepare` has checked the operands and allocated `out`."""
    weight = moekern.dequantize(b, out_dtype=torch.float32)
    rows = moekern.dequantize(a, out_dtype=torch.float32) if isinstance(a, ScaledTensor) else a.float()
    sums = rows @ weight.T
    for term in (bias, c):
        if term is not None:
            sums += term
    out.copy_(sums)


def refuses(a: Any, b: ScaledTensor, c: Any, bias: Any, out: torch.Tensor, out_dtype: torch.dtype) -> str | None:
    """Why it can't take a call, in words for `explain`; None if it can."""
    if out.shape[0] < FEWEST_ROWS:
        return f"decodes all weights first, which pays from {FEWEST_ROWS} rows"
    return None


def add() -> None:
    moekern.fp8_gemm_nt.add(Kernel(NAME, run, kind="cpu", refuses=refuses))


def check(rows: int) -> None:
    """Within the op's own bounds, like every kernel of moekern."""
    torch.manual_seed(0)
    a = moekern.per_token_cast_to_fp8(torch.randn(rows, 1000))
    b = moekern.per_block_cast_to_fp8(torch.randn(300, 1000))
    for activations in (a, torch.randn(rows, 1000).bfloat16()):
        with moekern.use(kernel={"fp8_gemm_nt": NAME}):
            out = moekern.fp8_gemm_nt(activations, b)
        oracle = gemm_oracle(moekern.fp8_gemm_nt, activations, b)
        check_bound(out, oracle)
        check_rms(out, oracle)


def compare(a: torch.Tensor, b: ScaledTensor, times: int = 15) -> dict[str, float]:
    """Median seconds of this kernel and of the one that the op chooses, in turns."""
    found: dict[str, list[float]] = {NAME: [], "the op's choice": []}
    for _ in range(times):
        for name, samples in found.items():
            with moekern.use(kernel={"fp8_gemm_nt": NAME} if name == NAME else {}):
                started = time.perf_counter()
                moekern.fp8_gemm_nt(a, b)
                samples.append(time.perf_counter() - started)
    return {name: statistics.median(samples) for name, samples in found.items()}


def main() -> None:
    add()
    check(rows=128)
    print(f"{NAME} is within the bounds of fp8_gemm_nt")
    b = moekern.per_block_cast_to_fp8(torch.randn(2048, 2048))
    for rows in (1, 256):
        print(moekern.explain(moekern.fp8_gemm_nt, torch.randn(rows, 2048), b))
    for name, seconds in compare(torch.randn(256, 2048), b).items():
        print(f"256 rows by {name}: {1e3 * seconds:.1f} ms")


if __name__ == "__main__":
    main()
