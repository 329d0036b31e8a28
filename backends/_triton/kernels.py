"""Every op's Triton kernels for the devices of one kind. Triton is imported by the first call."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from moekern.backends._triton.targets import Target, native_formats
from moekern.backends._triton.tiles import Shape, Tiles
from moekern.backends._triton.tuned import preferred
from moekern.op import Device, Kernel, Op, location
from moekern.ops import (
    dequantize,
    fp8_gemm_nt,
    fused_experts,
    k_grouped_fp8_gemm_tn_contiguous,
    m_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nt_masked,
    moe_gate,
    moe_permute,
    moe_unpermute,
    per_block_cast_to_fp8,
    per_channel_cast_to_fp8,
    per_token_cast_to_fp8,
    silu_mul_cast_to_fp8,
)

FEWEST_ROWS = 32  # of a product, or a group on average, up to which the kernels for few rows take it
_SHAPES = 4096  # whose tiles are remembered
_OLDEST = (3, 6)  # the release of Triton from which on all kernels compile
_DISTRIBUTIONS = ("triton", "triton-rocm", "pytorch-triton-rocm", "pytorch-triton")  # that have it: torch has builds
_INSTALL = {"cuda": "pip install 'moekern[cuda]'", "rocm": "torch for ROCm brings it"}


@dataclass(frozen=True)
class Family:
    """kind, prefix: of the kernels' devices and names. The rest is asked at every call."""

    kind: str
    prefix: str
    target_of: Callable[[torch.device], Target]
    choose: Callable[[Target, Shape], Tiles]  # whose tiles leave a row's bits alone
    choose_for_few_rows: Callable[[Target, Shape], Tiles]


@dataclass(frozen=True)
class _Row:
    """plan: (module, function) that turns a prepared call into launches. products: it takes a target and tiles."""

    op: Op
    plan: tuple[str, str]
    refuses: tuple[str, str] | None = None
    products: bool = False
    rows: Callable[..., int] | None = None  # (call) -> rows of the product, for those with a kernel for few


_CASTS = (per_token_cast_to_fp8, per_block_cast_to_fp8, per_channel_cast_to_fp8)


def _rows_of_groups(a: Any, b: Any, layout: Any, out: torch.Tensor, out_dtype: Any) -> int:
    return out.shape[-2] if out.dim() == 3 else -(-out.shape[0] // max(len(layout.counts), 1))


def _rows_of_experts(x: Any, experts: Any, ids: torch.Tensor, *rest: Any) -> int:
    return -(-ids.numel() // experts.num_experts)


_ROWS = (
    _Row(
        fp8_gemm_nt,
        ("gemm", "gemm"),
        ("gemm", "refuses"),
        True,
        lambda a, b, c, bias, out, out_dtype: len(out),
    ),
    *(
        _Row(op, ("grouped", "m_grouped"), ("grouped", "refuses_m_grouped"), True, _rows_of_groups)
        for op in (m_grouped_fp8_gemm_nt_contiguous, m_grouped_fp8_gemm_nt_masked)
    ),
    _Row(
        k_grouped_fp8_gemm_tn_contiguous, ("grouped", "k_grouped"), ("grouped", "refuses_k_grouped"), True
    ),
    _Row(fused_experts, ("experts", "fused_experts"), ("experts", "refuses"), True, _rows_of_experts),
    *(_Row(op, ("casts", "to_fp8")) for op in _CASTS),
    _Row(silu_mul_cast_to_fp8, ("casts", "silu_mul_to_fp8")),
    _Row(dequantize, ("casts", "dequantize")),
    _Row(moe_gate, ("gate", "gate")),
    _Row(moe_permute, ("permute", "permute")),
    _Row(moe_unpermute, ("permute", "unpermute")),
)  # fmt: skip


def why_not(kind: str = "cuda") -> str | None:
    """Why Triton cannot be used here for devices of a kind, or None. Does not import it."""
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed ({_INSTALL[kind]})"
    found = version()
    if found and tuple(int(part) for part in found.split(".")[:2]) < _OLDEST:
        return f"Triton is {found}; {_OLDEST[0]}.{_OLDEST[1]} or later is needed"
    return None


def version() -> str | None:
    """Of Triton, by whatever name it was installed."""
    from importlib import metadata

    for name in _DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def device(kind: str, arch: str, index: int, name: str) -> Device:
    """What the architecture and the software here make of a GPU."""
    reason = why_not(kind)
    features = {f"fp8_{format}" for format in native_formats(arch)}
    if reason is None:
        features.add("triton")
    return Device(kind, arch, frozenset(features), index, name, without=(("triton", reason),) if reason else ())


def kernels(family: Family) -> Iterator[tuple[Op, Kernel]]:
    """Each op's, best first."""
    for row in _ROWS:
        for few in (True, False) if row.rows else (False,):
            yield row.op, _kernel(family, row, few)


def taking(found: Iterable[tuple[Op, Kernel]], op: Op, prepared: tuple[Any, ...]) -> Kernel | None:
    """The first of an op's kernels that takes the call, which is as `op.prepare` returns it."""
    own = (kernel for of, kernel in found if of is op)
    return next((kernel for kernel in own if kernel.refuses is None or kernel.refuses(*prepared) is None), None)


@functools.cache
def _function(module: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"moekern.backends._triton.{module}"), name)


def _kernel(family: Family, row: _Row, few: bool) -> Kernel:
    choose = family.choose_for_few_rows if few else family.choose
    # which compares many tiles, at every call of a layer the same
    choose = functools.lru_cache(_SHAPES)(preferred(choose, few))
    output = row.op.output_index

    def run(*call: Any) -> None:
        plan = _function(*row.plan)
        if row.products:
            launches = plan(family.target_of(location(call[output])), choose, *call)
        else:
            launches = plan(*call)
        for launch in launches:
            launch.run()

    def refuses(*call: Any) -> str | None:
        if few and row.rows is not None and (rows := row.rows(*call)) > FEWEST_ROWS:
            return f"is for up to {FEWEST_ROWS} rows; there are {rows}"
        return None if row.refuses is None else _function(*row.refuses)(*call)

    run.__signature__ = inspect.signature(row.op.reference)  # type: ignore[attr-defined]
    workspace = _workspace if row.op is fused_experts else None
    name = f"{family.prefix}.triton{'_stream' if few else ''}"
    needs = frozenset({"triton"})
    return Kernel(name, run, family.kind, needs, refuses, few, workspace)


def _workspace(*call: Any) -> int:
    return _function("experts", "workspace_bytes")(*call)
