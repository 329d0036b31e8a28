"""Tests on an accelerator: how operands come there and back (on_device.py), graphs, streams, and that nothing waits.

What kernels compute there is in the other files: their executors are among those that tests take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import executors
import on_device
import pytest
import torch
from test_triton import LISTS

import moekern
from moekern import Device, GroupedLayout, Kernel, Op, ScaledTensor
from moekern.testing import cases, expert_cases, grouped_cases, routing_cases
from moekern.testing.cases import Gemm
from moekern.testing.expert_cases import Experts
from moekern.testing.grouped_cases import KGrouped, MGrouped
from moekern.testing.moving import Mover, tensors
from moekern.testing.numerics import check_bound, gemm_oracle
from moekern.testing.routing_cases import Gate, Permute, Unpermute

CPU = torch.device("cpu")


def on_devices(check: Any) -> Any:
    """Runs `check(where=...)` on every device, with the mark `gpu`; says why there is none."""
    found: list[Any] = [where for where, _ in on_device.devices()]
    none = pytest.param(None, marks=pytest.mark.skip(reason=on_device.why_none()))
    return pytest.mark.gpu(pytest.mark.parametrize("where", found or [none], ids=str)(check))


# ---- there and back ----------------------------------------------------------------------------------


def scalar(op: Op) -> Kernel:
    """Which takes every call."""
    return next(kernel for kernel in op.kernels if kernel.kind == "cpu" and not kernel.needs)


def memories(x: Any) -> list[torch.Tensor]:
    """The bytes of all that operands lie in."""
    storages = {x.untyped_storage()._cdata: x.untyped_storage() for x in tensors(x)}
    return [torch.empty(0, dtype=torch.uint8).set_(storage) for storage in storages.values()]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8) if x.dim() else x


def twice(op: Op) -> executors.Executor:
    """Moves operands from memory to memory; then calls the op with those of the test, and compares all they lie in."""
    kernel, cpu = scalar(op), moekern.devices()[0]
    moving = on_device.executor(op, kernel, cpu, CPU)

    def run(*args: Any, **kwargs: Any) -> Any:
        all_of_it = memories((args, kwargs))
        before = [x.clone() for x in all_of_it]
        got = moving.run(*args, **kwargs)
        after = [x.clone() for x in all_of_it]
        for x, old in zip(all_of_it, before, strict=True):
            x.copy_(old)
        with moekern.use(kernel={op.name: kernel.name}):
            expected = op(*args, **kwargs)
        assert all(map(torch.equal, all_of_it, after))
        for theirs, ours in zip(tensors(got), tensors(expected), strict=True):
            assert (theirs.shape, theirs.stride(), theirs.dtype) == (ours.shape, ours.stride(), ours.dtype)
            assert torch.equal(bits(theirs), bits(ours))
        return got

    return executors.Executor(op, kernel.name, run, None, moving.why_not)


@pytest.mark.parametrize(
    ("op", "check", "case"),
    [pytest.param(op, check, case, id=f"{op.name}-{case}") for op, all, check, *_ in LISTS for case in all[3::23]],
)
def test_moved_operands_give_the_same_bits(op: Op, check: Callable[[Any, Any], None], case: Any) -> None:
    """In the output, around it, and in the operands."""
    check(twice(op), case)


def test_memory_is_moved_as_it_is() -> None:
    p = cases.gemm_operands(Gemm(5, 66, 267, a="e4m3fn", layout_a="every_other", layout_b="columns", bias="bf16"))
    experts = expert_cases.operands(Experts(4, 60, 40, 3, 2, form="interleaved", bias="f32")).experts
    weights = grouped_cases.m_grouped_operands(MGrouped((2, 3), 30, 200, separate=True))[1]
    layout = GroupedLayout.from_masked([3, 0, 2], 4)
    out = torch.zeros(7, 9).t()[2:]
    operands = (p.a, p.b, None, p.bias, experts, weights, layout, out, {"out": out, "c": out[1:], "topk": 3})
    there = Mover(CPU)
    moved = there(operands)
    assert moved[8]["out"] is moved[7] and there.back(moved[7]) is out and there.back(moved[4]) is experts
    assert moved[8]["c"].data_ptr() == moved[7][1:].data_ptr() and moved[8]["topk"] == 3
    assert repr(moved[4]) == repr(experts) and repr(moved[5]) == repr(weights) and repr(moved[6]) == repr(layout)
    pairs = list(zip(tensors(operands), tensors(moved), strict=True))
    assert len(pairs) == 4 + 1 + 6 + 4 + 2 + 3
    for x, y in pairs:
        assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
        assert x.storage_offset() == y.storage_offset() and x.data_ptr() != y.data_ptr()
        assert torch.equal(bits(x), bits(y))


def test_a_kernel_that_writes_to_an_operand_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    op, kernel = moekern.dequantize, Kernel("cpu.wrong", lambda x, out, out_dtype: x.scale.add_(1), "cpu")
    monkeypatch.setattr(op, "kernels", [kernel])
    wrong = on_device.executor(op, kernel, moekern.devices()[0], CPU)
    with pytest.raises(AssertionError, match="wrote to an operand"):
        wrong(moekern.per_token_cast_to_fp8(torch.ones(3, 5)))


def test_one_device_of_every_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels, in the tests that take executors, with the mark `gpu`."""
    found = [
        Device("cuda", arch, frozenset({"triton"}), index) for index, arch in enumerate(("sm_90", "sm_80", "sm_90"))
    ]
    monkeypatch.setattr(moekern.backends.loaded["cuda"], "devices", found)
    assert on_device.devices() == [(torch.device("cuda:2"), found[2]), (torch.device("cuda:1"), found[1])]
    op = Op(moekern.dequantize.reference, moekern.dequantize.prepare, "out")
    op.add(Kernel("cpu.one", lambda x, out, out_dtype: None, "cpu"))
    op.add(Kernel("cuda.one", lambda x, out, out_dtype: None, "cuda"))
    here, there = executors.this_machine(op), on_device.executors(op)
    assert [str(e) for e in here] == ["dequantize=cpu.one"]
    assert [str(e) for e in there] == ["dequantize=sm_90:cuda.one", "dequantize=sm_80:cuda.one"]
    assert not on_device.is_here(here[0]) and all(map(on_device.is_here, there)) and not there[0].absent


# ---- graphs, and waiting ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One op's call with operands whose values, and nothing else, depend on a seed."""

    op: Op
    of: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]

    def __str__(self) -> str:
        return self.op.name


def of_groups(seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    counts = ((3, 0, 40, 17), (17, 40, 0, 3))[seed]
    return grouped_cases.m_grouped_operands(MGrouped(counts, 257, 384, a="e4m3fn"), seed), {}


def masked(seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    counts = ((3, 0, 40, 17), (17, 40, 0, 3))[seed]
    return grouped_cases.m_grouped_operands(MGrouped(counts, 257, 384, capacity=40), seed), {}


def along_rows(seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    counts = ((128, 0, 256, 40), (256, 0, 128, 40))[seed]
    return grouped_cases.k_grouped_operands(KGrouped(counts, 130, 70))[:3], {}


def gemm(seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    p = cases.gemm_operands(Gemm(40, 257, 384, a="e4m3fn", bias="f32"), seed)
    return (p.a, p.b, p.c, p.bias), {}


LAYER = Experts(9, 200, 130, 3, 2, quantize=True, shared=1)


def layer(seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    p = expert_cases.operands(LAYER, seed)
    first = expert_cases.operands(LAYER, 0)
    return (p.x, first.experts, p.ids, p.weights), first.options


PROBLEMS = (
    Problem(moekern.fp8_gemm_nt, gemm),
    Problem(moekern.m_grouped_fp8_gemm_nt_contiguous, of_groups),
    Problem(moekern.m_grouped_fp8_gemm_nt_masked, masked),
    Problem(moekern.k_grouped_fp8_gemm_tn_contiguous, along_rows),
    *(
        Problem(
            getattr(moekern, name), lambda seed, name=name: ((cases.cast_input(cases.Cast(name, 130, 384), seed),), {})
        )  # type: ignore[misc]
        for name in cases.CAST_OPS
    ),
    Problem(moekern.dequantize, lambda seed: ((cases.dequantize_input(cases.Dequantize(130, 300), seed),), {})),
    Problem(
        moekern.moe_gate,
        lambda seed: routing_cases.gate_operands(
            Gate(64, 160, 6, scoring="sigmoid", bias="f32", groups=8, kept=3, renormalize=True), seed
        ),
    ),
    *(
        Problem(
            moekern.moe_permute,
            lambda seed, cast=cast: routing_cases.permute_operands(
                Permute(64, 256, 16, 4, alignment=8, format=cast), seed
            ),
        )  # type: ignore[misc]
        for cast in (None, "e4m3fn")
    ),
    Problem(
        moekern.moe_unpermute, lambda seed: (routing_cases.unpermute_operands(Unpermute(64, 256, 4, 300), seed), {})
    ),
    Problem(moekern.fused_experts, layer),
)
Record = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]  # of a call: how to repeat it, and its result


def check_replayed(problem: Problem, where: torch.device, record: Record) -> None:
    """A recorded call, repeated on other values in the same memory, has the bits of a call on those values."""
    there = Mover(where)
    args, kwargs = there(problem.of(0))
    other_args, other_kwargs = Mover(where)(problem.of(1))
    first = problem.op(*args, **kwargs)
    repeat, result = record(lambda: problem.op(*args, **kwargs))
    repeat()
    assert same(result, first, problem)
    for x, other in zip(tensors((args, kwargs)), tensors((other_args, other_kwargs)), strict=True):
        x.view(cases.storable(x.dtype)).copy_(other.view(cases.storable(x.dtype)))
    repeat()
    expected = problem.op(*other_args, **other_kwargs)
    assert same(result, expected, problem) and not same(result, first, problem)


def same(x: Any, y: Any, problem: Problem) -> bool:
    if problem.op is moekern.moe_permute:  # behind the last group nothing is written
        end = int((x.layout.starts + x.layout.counts).max())
        x, y = (([rows[:end] for rows in tensors(p.x)], p.layout, p.inverse) for p in (x, y))
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(tensors(x), tensors(y), strict=True))


def by_hand(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    result = call()

    def repeat() -> None:
        for x, new in zip(tensors(result), tensors(call()), strict=True):
            x.view(cases.storable(x.dtype)).copy_(new.view(cases.storable(x.dtype)))

    return repeat, result


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_what_graphs_are_checked_with(problem: Problem) -> None:
    check_replayed(problem, CPU, by_hand)


def in_a_graph(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result


@on_devices
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_a_graph(where: torch.device, problem: Problem) -> None:
    with torch.cuda.device(where):
        check_replayed(problem, where, in_a_graph)


@on_devices
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_nothing_waits(where: torch.device, problem: Problem) -> None:
    """From the second call on: the first compiles, and makes tables of where weights lie."""
    args, kwargs = Mover(where)(problem.of(0))
    with torch.cuda.device(where):
        first = problem.op(*args, **kwargs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = problem.op(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert same(again, first, problem)


@on_devices
def test_another_stream(where: torch.device) -> None:
    """Kernels run on torch's current stream: behind what was queued there, a long wait and the operands."""
    args, _ = Mover(where)(gemm(0))
    other, _ = Mover(where)(gemm(1))
    with torch.cuda.device(where):
        expected = moekern.fp8_gemm_nt(*other)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(100_000_000)
            for x, new in zip(tensors(args), tensors(other), strict=True):
                x.view(cases.storable(x.dtype)).copy_(new.view(cases.storable(x.dtype)))
            result = moekern.fp8_gemm_nt(*args)
        torch.cuda.synchronize()
    assert torch.equal(bits(result), bits(expected))


@on_devices
def test_aligned_operands(where: torch.device) -> None:
    """Of tests, that is, whose operands lie as badly as can be: what is aligned may be read in another way."""
    g = torch.Generator().manual_seed(0)
    b = moekern.per_block_cast_to_fp8(torch.randn(768, 512, generator=g))
    stack = ScaledTensor(b.data.view(2, 384, 512), b.scale.view(2, 3, 4), b.block)
    for m in (16, 320):
        x = torch.randn(m, 512, generator=g).bfloat16()
        for a in (x, moekern.per_token_cast_to_fp8(x)):
            there = Mover(where)
            result = there.back(moekern.fp8_gemm_nt(*there((a, b))))
            check_bound(result, gemm_oracle(moekern.fp8_gemm_nt, a, b))
            op, layout = moekern.m_grouped_fp8_gemm_nt_contiguous, GroupedLayout.from_counts([m - 7, 7])
            result = there.back(op(*there((a, stack, layout))))
            check_bound(result, grouped_cases.m_grouped_oracle(op, a, stack, layout))


# ---- other libraries' arrays and streams -------------------------------------------------------------


class Array:
    """float32 on a GPU, it says, of a library that has streams. `readied`: for whom."""

    dtype = "float32"

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.readied = x, []  # type: ignore[var-annotated]

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, stream: int | None = None, **_: Any) -> Any:
        self.readied.append(stream)
        return self.x.__dlpack__()


@pytest.mark.parametrize(("current", "named"), [(0x51, 0x51), (0, 1)])  # 1: the default stream, in DLPack
def test_arrays_are_made_ready_for_the_current_stream(
    monkeypatch: pytest.MonkeyPatch, current: int, named: int
) -> None:
    """Of torch, on which kernels run: DLPack has the producer order its own stream before that."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=current))
    x = torch.randn(5, 300)
    q, scale = moekern.per_block_cast_to_fp8(torch.randn(7, 300))
    arrays = Array(x), Array(scale)
    assert torch.equal(moekern.fp8_gemm_nt(arrays[0], (q, arrays[1])), moekern.fp8_gemm_nt(x, (q, scale)))
    assert [array.readied for array in arrays] == [[named], [named]]


@on_devices
def test_cupy(where: torch.device) -> None:
    """Arrays of a stream of CuPy's: in, out by DLPack, and as `out` where both libraries have one stream."""
    cupy = pytest.importorskip("cupy")
    x = torch.randn(40, 384)
    q, scale = moekern.per_block_cast_to_fp8(torch.randn(257, 384))
    with torch.cuda.device(where), cupy.cuda.Device(where.index), cupy.cuda.Stream(non_blocking=True) as stream:
        expected = moekern.fp8_gemm_nt(x.to(where), (q.to(where), scale.to(where))).cpu()
        a, s = cupy.asarray(x.numpy()), cupy.asarray(scale.numpy())
        codes = torch.from_dlpack(cupy.asarray(q.view(torch.uint8).numpy())).view(q.dtype)
        result = cupy.from_dlpack(moekern.fp8_gemm_nt(a, (codes, s)))
        assert torch.equal(torch.from_numpy(cupy.asnumpy(result)), expected)
        out = cupy.empty(result.shape, result.dtype)
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
            moekern.fp8_gemm_nt(a, (codes, s), out=torch.from_dlpack(out))
        assert torch.equal(torch.from_numpy(cupy.asnumpy(out)), expected)
