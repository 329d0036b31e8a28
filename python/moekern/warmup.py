"""Compiles the GPU kernels that a model's layers launch, into Triton's cache: then no request waits for a compiler."""

from __future__ import annotations

import argparse
import importlib
import math
import mmap
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moekern import models, ops
from moekern.experts import ExpertWeights
from moekern.layout import GroupedLayout
from moekern.op import Op
from moekern.scaled import BLOCK, ScaledTensor

ACTIVATIONS = ("fp8", "bf16")
# Integers are compiled in where they are 1, and known where they are multiples of 16. Tiles change at powers of two.
TOKENS = (1, *(tokens for e in range(1, 14) for tokens in (2**e, 2 ** (e + 1) - 1)))
_KINDS = ("cuda", "rocm")
_NORESERVE = 0x4000  # Linux: mmap.MAP_NORESERVE of later Pythons


@dataclass(frozen=True)
class Call:
    op: Op
    what: str
    prepared: tuple[Any, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, help=f"a config.json of transformers', or one of {', '.join(models.names())}"
    )
    parser.add_argument(
        "--tokens", type=_counts, help="numbers of tokens, 1,16,4096; all powers of two up to 8192, and odd ones"
    )
    parser.add_argument(
        "--activations", type=_kinds, default=ACTIVATIONS, help="of products: fp8 (W8A8), bf16 (W8A16); both"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--device", help="one that is here, cuda:0; the first")
    where.add_argument("--target", help="an architecture that need not be here: sm_90, gfx942, ...")


def run(options: argparse.Namespace) -> int:
    """Prints a line for every call that brought new kernels. 2: nothing could be done; 1: something failed."""
    try:
        model = models.load(options.config)
        target = _target(options)
    except ValueError as error:
        print(f"moekern warmup: {error}", file=sys.stderr)
        return 2
    from moekern.backends._triton import warmup

    start, failed, without = time.perf_counter(), 0, dict[str, None]()
    found: list[warmup.Compiled] = []
    warm = warmup.Warmup(target)
    print(f"{model.name} for {target.name}, {target.processors} processors")
    for call in calls(model, options.tokens or TOKENS, options.activations):
        done = warm.call(call.op, call.prepared)
        found += done.compiled
        failed += done.failure is not None
        if done.kernel is None:
            without[call.op.name] = None
        elif done.compiled or done.failure:
            print(_line(call, done), flush=True)
    for name in without:
        print(f"{name}: no kernel takes some of its calls")
    fresh = sum(not compiled.cached for compiled in found)
    seconds = time.perf_counter() - start
    print(f"{fresh} compiled, {len(found) - fresh} found, {failed} calls failed, {seconds:.0f} s, in {warmup.folder()}")
    return 1 if failed else 0


def _line(call: Call, done: Any) -> str:
    ways = [f"{c.kernel} {'found' if c.cached else f'{c.seconds:.1f} s'}" for c in done.compiled]
    failure = [f"FAILED: {done.failure}"] if done.failure else []
    return f"{call.op.name:<33}{call.what:<40}{done.kernel:<20}{', '.join(ways + failure)}"


def _target(options: argparse.Namespace) -> Any:
    """The architecture to compile for. Raises ValueError in plain words."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise ValueError("TRITON_INTERPRET is set, and with it Triton compiles nothing")
    if (reason := importlib.import_module("moekern.backends._triton.kernels").why_not()) is not None:
        raise ValueError(reason)
    from moekern.backends._triton.targets import TARGETS

    if options.target is not None:
        if options.target not in TARGETS:
            raise ValueError(f"--target {options.target} is not known; these are: {', '.join(TARGETS)}")
        return TARGETS[options.target]
    devices = {str(name): module for name, module in _devices()}
    name = options.device or next(iter(devices), None)
    if name is None:
        reasons = "; ".join(f"{kind}: {_backend(kind).probe()}" for kind in _KINDS)
        raise ValueError(f"no GPU is here ({reasons}); --target compiles for one of {', '.join(TARGETS)}")
    if name not in devices:
        raise ValueError(f"--device {name} is not here; these are: {', '.join(devices) or 'none'}")
    return devices[name].target_of(torch.device(name))


def _devices() -> Iterator[tuple[str, Any]]:
    """(torch's name, backend) of the GPUs that are here."""
    for kind in _KINDS:
        backend = _backend(kind)
        found = backend.probe()
        if not isinstance(found, str):
            yield from ((name, backend) for device in found for name in backend.torch_devices(device))


def _backend(kind: str) -> Any:
    return importlib.import_module(f"moekern.backends.{kind}")


def _counts(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text} is no list of numbers of tokens: 1,16,4096")
    return tuple(map(int, parts))


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(text.split(","))
    if not set(kinds) <= set(ACTIVATIONS):
        raise argparse.ArgumentTypeError(f"{text} is not of {', '.join(ACTIVATIONS)}")
    return kinds


def calls(model: models.Model, tokens: Sequence[int], activations: Sequence[str] = ACTIVATIONS) -> Iterator[Call]:
    """What layers of the model ask for. activations: of products, "fp8" (W8A8) or "bf16" (W8A16)."""
    for linear in model.linears:
        b = _scaled((linear.n, linear.k), model.block)
        for count in tokens:
            out = _empty((count, linear.n), torch.bfloat16)
            x = _empty((count, linear.k), torch.bfloat16)
            said = f"{linear.name}: {count} x {linear.n} x {linear.k}"
            if "fp8" in activations:
                yield _cast(x)
                a = _scaled((count, linear.k), (1, BLOCK))
                yield Call(ops.fp8_gemm_nt, said, ops.fp8_gemm_nt.prepare(a, b, out=out))
            if "bf16" in activations:
                yield Call(ops.fp8_gemm_nt, f"{said}, bf16", ops.fp8_gemm_nt.prepare(x, b, out=out))
    if model.experts is not None:
        yield from _experts(model, tokens, activations)


def _cast(x: torch.Tensor) -> Call:
    rows, columns = x.shape
    return Call(
        ops.per_token_cast_to_fp8, f"{rows} x {columns}",
        ops.per_token_cast_to_fp8.prepare(x, out=_scaled((rows, columns), (1, BLOCK))),
    )  # fmt: skip


def _experts(model: models.Model, tokens: Sequence[int], activations: Sequence[str]) -> Iterator[Call]:
    """Of a router and its experts: in one call, and sorted, multiplied and brought back one by one."""
    of = model.experts
    assert of is not None
    groups, hidden, size = of.count, of.hidden, of.intermediate
    w13, w2 = _scaled((groups, 2 * size, hidden), model.block), _scaled((groups, hidden, size), model.block)
    experts = ExpertWeights(w13, w2)
    shared = None
    if of.shared:
        shared = ExpertWeights(
            _scaled((of.shared, 2 * size, hidden), model.block), _scaled((of.shared, hidden, size), model.block)
        )
    bias = _empty((groups,), torch.float32) if of.correction_bias else None
    for count in tokens:
        x = _empty((count, hidden), torch.bfloat16)
        out = _empty((count, hidden), torch.bfloat16)
        weights = _empty((count, of.top_k), torch.float32)
        for dtype in (torch.float32, torch.bfloat16):
            gate = ops.moe_gate.prepare(
                _empty((count, groups), dtype), of.top_k, scoring=of.scoring, correction_bias=bias,
                num_expert_group=of.groups, topk_group=of.kept_groups, renormalize=of.renormalise,
                routed_scaling_factor=of.scaling,
            )  # fmt: skip
            yield Call(ops.moe_gate, f"{count} x {groups}, {str(dtype).removeprefix('torch.')}", gate)
        for ids in (torch.zeros((count, of.top_k), dtype=dtype) for dtype in (torch.int32, torch.int64)):
            said = f"{count} tokens, {str(ids.dtype).removeprefix('torch.')}"
            for beside in dict.fromkeys((None, shared)):
                for kind in activations:
                    prepared = ops.fused_experts.prepare(
                        x, experts, ids, weights, quantize_activations=kind == "fp8", shared=beside, out=out
                    )
                    yield Call(ops.fused_experts, f"{said}, {kind}{', shared' if beside else ''}", prepared)
            yield Call(ops.moe_permute, said, ops.moe_permute.prepare(x, ids, groups))
        slots = count * of.top_k
        layout = GroupedLayout.from_counts([slots] + [0] * (groups - 1))
        masked = GroupedLayout.from_masked([0] * groups, count)
        for kind in activations:
            for w in (w13, w2):
                n, k = w.shape[-2:]
                for op, rows, which in (
                    (ops.m_grouped_fp8_gemm_nt_contiguous, (slots,), layout),
                    (ops.m_grouped_fp8_gemm_nt_masked, (groups, count), masked),
                ):
                    a = _scaled((*rows, k), (1, BLOCK)) if kind == "fp8" else _empty((*rows, k), torch.bfloat16)
                    prepared = op.prepare(a, w, which, out=_empty((*rows, n), torch.bfloat16))
                    yield Call(op, f"{' x '.join(map(str, (*rows, n, k)))}, {kind}", prepared)
        if "fp8" in activations:
            gated = _empty((slots, 2 * size), torch.bfloat16)
            h = ops.silu_mul_cast_to_fp8.prepare(gated, out=_scaled((slots, size), (1, BLOCK)))
            yield Call(ops.silu_mul_cast_to_fp8, f"{slots} x {size}", h)
            yield _cast(x)
        y, inverse = _empty((slots, hidden), torch.bfloat16), torch.zeros((count, of.top_k), dtype=torch.int32)
        back = ops.moe_unpermute.prepare(y, inverse, weights, out=out)
        yield Call(ops.moe_unpermute, f"{count} x {hidden}", back)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Addresses alone: a layer of experts may be larger than the memory of the machine that compiles."""
    count = max(math.prod(shape) * dtype.itemsize, 1)
    pages = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    return torch.frombuffer(pages, dtype=torch.uint8)[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def _scaled(shape: tuple[int, ...], block: tuple[int, int]) -> ScaledTensor:
    *groups, rows, columns = shape
    grid = (*groups, -(-rows // block[0]), -(-columns // block[1]))
    return ScaledTensor(_empty(shape, torch.float8_e4m3fn), _empty(grid, torch.float32), block)
