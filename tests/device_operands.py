"""An accelerator in name only, and every op's `prepare` with operands on it: run as a script.

Its tensors lie in memory that C++ may not touch: a look at their values kills the process, so each case has one of its
own. Python may do with them what an accelerator queues; what would wait for it is an error. Prints a line a case.
"""

from __future__ import annotations

import ctypes
import faulthandler
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import moekern
from moekern import Device, ExpertWeights, GroupedLayout, GroupedWeights, Kernel, NotSupported, Permuted, ScaledTensor
from moekern import op as dispatcher
from moekern.compat import deep_gemm, vllm
from moekern.integrations import transformers
from moekern.ops import OPS, Routing

WHERE = torch.device("cuda", 7)
KIND = "pretended"
SIZE = 1 << 36
MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE = 0x02, 0x20, 0x4000

WAITS = {
    "__array__", "__bool__", "__complex__", "__contains__", "__float__", "__index__", "__int__", "__repr__", "allclose",
    "argwhere", "bincount", "cpu", "equal", "is_nonzero", "item", "masked_select", "nonzero", "numpy", "tolist",
    "unique", "unique_consecutive",
}  # fmt: skip


class Waited(Exception):
    """Python looked at what is on the accelerator, or moved something there."""


class Accelerator(TorchFunctionMode):
    """Within it, tensors marked by `on`, and what is made of them, are on WHERE for everybody who asks."""

    def __init__(self) -> None:
        super().__init__()
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
        self.forbidden = libc.mmap(None, SIZE, 0, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if self.forbidden == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), "mmap")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name == "__get__" and func.__self__ is torch.Tensor.device and is_on(args[0]):  # type: ignore[comparison-overlap]
            return WHERE
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if is_on(x)]
        if name == "data_ptr" and ours:
            address: int = func(*args)
            return address and self.forbidden + address % SIZE
        made = kwargs.get("device") == WHERE
        if made:
            kwargs["device"] = "cpu"
        if (made and name == "tensor") or (ours and waits(name, args, kwargs)):
            raise Waited(name)
        if ours and any(x.dim() and not is_on(x) for x in tensors):
            raise RuntimeError(f"{name}: tensors on two devices")
        result = func(*args, **kwargs)
        return tree_map(mark, result) if ours or made else result


def waits(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name == "to":
        return any(isinstance(x, (str, torch.device)) for x in (*args[1:], *kwargs.values()))
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None and any(isinstance(x, torch.Tensor) for x in args[1:])
    if name in ("__getitem__", "__setitem__"):
        return any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1]))
    return name in WAITS


def is_on(x: Any) -> bool:
    return getattr(x, "pretended", False)


def mark(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        x.pretended = True  # type: ignore[attr-defined]
    return x


def on(x: Any) -> Any:
    """x, on the accelerator."""
    if isinstance(x, ScaledTensor):
        return ScaledTensor(on(x.data), on(x.scale), x.block)
    return mark(x.detach())


# ---- operands ----------------------------------------------------------------------------------------

E, T, TOPK, H, I, ROWS = 4, 6, 2, 256, 128, 12  # ROWS: of the T * TOPK slots


def floats(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    return on(torch.zeros(shape, dtype=dtype))


def floats32(*shape: int) -> Any:
    return floats(*shape, dtype=torch.float32)


def numbers(*values: int, dtype: torch.dtype = torch.int32) -> Any:
    return on(torch.tensor(values, dtype=dtype))


def fp8(*shape: int, block: tuple[int, int] = (1, 128)) -> Any:
    rows, columns = -(-shape[-2] // block[0]), -(-shape[-1] // block[1])
    data = torch.zeros(shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return on(ScaledTensor(data, torch.ones(*shape[:-2], rows, columns), block))


def weight(*shape: int) -> Any:
    return fp8(*shape, block=(128, 128))


def ids(value: int = 0) -> Any:
    return on(torch.full((T, TOPK), value, dtype=torch.int32))


def experts() -> ExpertWeights:
    return ExpertWeights(weight(E, 2 * I, H), weight(E, H, I), b13=floats(E, 2 * I), b2=floats(E, H))


def columns(*shape: int) -> Any:
    return fp8(*shape, block=(128, 1))


def table() -> GroupedWeights:
    return GroupedWeights([weight(I, H) for _ in range(E)])


def space() -> Any:
    return on(torch.zeros(64, dtype=torch.uint8))


def contiguous(*counts: int, rows: int = ROWS) -> GroupedLayout:
    return GroupedLayout.from_counts(numbers(*counts or (3, 0, 4, 2)), rows=rows, check=False)


def masked(*counts: int) -> GroupedLayout:
    return GroupedLayout.from_masked(numbers(*counts or (3, 0, 4, 2)), 5, check=False)


HUGE = 2**31 - 1
Call = tuple[Any, ...]  # an op, its arguments, and last a dict of options if there are any
gemm, contiguous_gemm, masked_gemm, k_gemm, *CASTS = OPS[:8]
gate, permute, unpermute, fused = moekern.moe_gate, moekern.moe_permute, moekern.moe_unpermute, moekern.fused_experts
dequantize = moekern.dequantize

# Nothing but their values could be wrong with these, and some are.
CALLS: dict[str, Callable[[], Call]] = {
    "gemm": lambda: (gemm, floats(T, H), weight(I, H)),
    "gemm FP8": lambda: (gemm, fp8(T, H), weight(I, H), floats(T, I), floats(I)),
    "gemm out is c": lambda: (gemm, fp8(T, H), weight(I, H), x := floats(T, I), None, x),
    "contiguous": lambda: (contiguous_gemm, floats(ROWS, H), weight(E, I, H), contiguous()),
    "contiguous out": lambda: (contiguous_gemm, fp8(ROWS, H), weight(E, I, H), contiguous(), floats(ROWS, I)),
    "contiguous beyond": lambda: (contiguous_gemm, floats(ROWS, H), weight(E, I, H), contiguous(9, -5, HUGE, 1)),
    "contiguous table": lambda: (contiguous_gemm, fp8(ROWS, H), table(), contiguous(), floats(ROWS, I)),
    "contiguous no rows": lambda: (contiguous_gemm, floats(0, H), weight(E, I, H), contiguous(rows=0)),
    "masked": lambda: (masked_gemm, floats(E, 5, H), weight(E, I, H), masked()),
    "masked beyond": lambda: (masked_gemm, fp8(E, 5, H), weight(E, I, H), masked(-1, HUGE, 6, 0)),
    "masked out": lambda: (masked_gemm, fp8(E, 5, H), weight(E, I, H), masked(), floats(E, 5, I)),
    "k-grouped": lambda: (k_gemm, floats(ROWS, H), columns(ROWS, I), contiguous()),
    "k-grouped out is c": lambda: (k_gemm, columns(ROWS, H), columns(ROWS, I), contiguous(), x := floats(E, H, I), x),
    **{cast.name: lambda cast=cast: (cast, floats(T, H)) for cast in CASTS},  # type: ignore[misc]
    "cast out": lambda: (CASTS[0], floats(T, H), "e4m3fn", True, fp8(T, H)),
    "dequantize": lambda: (dequantize, weight(I, H)),
    "dequantize out": lambda: (dequantize, weight(I, H), floats(I, H)),
    "gate": lambda: (gate, floats(T, 8), TOPK, {"correction_bias": floats(8)}),
    "gate out": lambda: (gate, floats(T, 8), TOPK, {"out": Routing(floats32(T, TOPK), ids())}),
    "permute": lambda: (permute, floats(T, H), ids(), E),
    "permute beyond": lambda: (permute, floats(T, H), ids(HUGE), E, {"alignment": 128}),
    "permute map": lambda: (permute, fp8(T, H), ids(-9), E, {"expert_map": numbers(0, HUGE, -5)}),
    "permute out": lambda: (permute, fp8(T, H), ids(), E, {"out": Permuted(fp8(13, H), None, ids())}),
    "permute cast": lambda: (permute, floats(T, H), ids(), E, {"format": "e5m2", "round_scale_up": True}),
    "permute cast out": lambda: (
        permute,
        floats(T, H),
        ids(),
        E,
        {"format": "e4m3fn", "out": Permuted(fp8(13, H), None, ids())},
    ),
    "permute no experts": lambda: (permute, floats(T, H), ids(), 0),
    "unpermute": lambda: (unpermute, floats(ROWS, H), ids(), floats(T, TOPK)),
    "unpermute beyond": lambda: (unpermute, floats(ROWS, H), ids(HUGE), None, {"out": floats(T, H)}),
    "experts": lambda: (fused, floats(T, H), experts(), ids(HUGE), floats32(T, TOPK)),
    "experts map": lambda: (fused, fp8(T, H), experts(), ids(HUGE), {"expert_map": numbers(0, -7, HUGE)}),
    "experts out": lambda: (fused, floats(T, H), experts(), ids(), {"out": floats(T, H), "workspace": space()}),
    "experts shared": lambda: (fused, floats(T, H), experts(), ids(), {"shared": experts()}),
    "experts slots": lambda: (fused, floats(T, H), experts(), ids(), {"reduce": False}),
}


def _split(call: Call) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    op, *arguments = call
    options = arguments.pop() if type(arguments[-1]) is dict else {}
    return op, tuple(arguments), options


def prepared(make: Callable[[], Call]) -> None:
    op, arguments, options = _split(make())
    call = op.prepare(*arguments, **options)
    assert len(call) == len(op.params)
    out = call[op.output_index]
    assert dispatcher.location(out) == WHERE
    for x in tree_leaves(tuple(out) if isinstance(out, tuple) else out):
        parts = x if isinstance(x, ScaledTensor) else (x.starts, x.counts) if type(x) is GroupedLayout else (x,)
        assert all(is_on(part) for part in parts)
    try:
        op(*arguments, **options)
    except NotSupported as error:
        assert f"on {KIND}" in str(error) and f"runs on cpu, not {KIND}" in str(error), error
    else:
        raise AssertionError("no kernel was missed")


# ---- what stays refused ------------------------------------------------------------------------------

OTHER = "is on another device"

# What the message has, and the call.
REFUSALS: dict[str, tuple[str, Callable[[], Call]]] = {
    "gemm shape": ("a has shape", lambda: (gemm, floats(T, I), weight(I, H))),
    "gemm bias": (f"bias {OTHER}", lambda: (gemm, floats(T, H), weight(I, H), None, torch.zeros(I))),
    "gemm overlap": ("out overlaps a", lambda: (gemm, x := floats(T, I), weight(I, I), None, None, x)),
    "contiguous rows": ("a has 13", lambda: (contiguous_gemm, floats(13, H), weight(E, I, H), contiguous())),
    "contiguous groups": ("b has 3", lambda: (contiguous_gemm, floats(ROWS, H), weight(3, I, H), contiguous())),
    "contiguous layout": (
        f"layout.starts {OTHER}",
        lambda: (contiguous_gemm, floats(5, H), weight(1, I, H), GroupedLayout.from_counts([5])),
    ),
    "masked a": (f"a {OTHER}", lambda: (masked_gemm, torch.zeros(E, 5, H), weight(E, I, H), masked())),
    "masked layout": ("is contiguous", lambda: (masked_gemm, floats(E, 3, H), weight(E, I, H), contiguous())),
    "k-grouped c": ("c has", lambda: (k_gemm, floats(ROWS, H), columns(ROWS, I), contiguous(), floats(E, H, H))),
    "k-grouped a": (f"a {OTHER}", lambda: (k_gemm, torch.zeros(ROWS, H), columns(ROWS, I), contiguous())),
    **{cast.name: ("x has dtype", lambda cast=cast: (cast, ids())) for cast in CASTS},  # type: ignore[misc]
    "cast out": (f"out {OTHER}", lambda: (CASTS[0], floats(T, H), "e4m3fn", False, CASTS[0](torch.zeros(T, H)))),
    "dequantize shape": ("out has shape", lambda: (dequantize, weight(I, H), floats(H, I))),
    "dequantize out": (f"out {OTHER}", lambda: (dequantize, weight(I, H), torch.zeros(I, H))),
    "gate topk": ("topk is", lambda: (gate, floats(T, 8), 9)),
    "gate bias": (f"bias {OTHER}", lambda: (gate, floats(T, 8), 2, {"correction_bias": torch.zeros(8)})),
    "permute ids": (f"ids {OTHER}", lambda: (permute, floats(T, H), torch.zeros(T, 2, dtype=torch.int32), E)),
    "permute map": ("map has dtype", lambda: (permute, floats(T, H), ids(), E, {"expert_map": floats(3)})),
    "permute out": (
        f"needs {ROWS}, enough for any ids",
        lambda: (permute, floats(T, H), ids(), E, {"out": Permuted(floats(ROWS - 1, H), None, ids())}),
    ),
    "unpermute weights": ("weights has", lambda: (unpermute, floats(ROWS, H), ids(), floats(T, 3))),
    "unpermute y": (f"inverse {OTHER}", lambda: (unpermute, torch.zeros(ROWS, H), ids())),
    "experts ids": ("ids has dtype", lambda: (fused, floats(T, H), experts(), floats(T, TOPK))),
    "experts x": (f"x {OTHER}", lambda: (fused, torch.zeros(T, H), experts(), ids())),
    "experts map": ("map has dtype", lambda: (fused, floats(T, H), experts(), ids(), {"expert_map": floats(3)})),
    "experts map elsewhere": (
        f"map {OTHER}",
        lambda: (fused, floats(T, H), experts(), ids(), {"expert_map": torch.zeros(3, dtype=torch.int32)}),
    ),
}


def refused(words: str, make: Callable[[], Call]) -> None:
    op, arguments, options = _split(make())
    try:
        op.prepare(*arguments, **options)
    except (TypeError, ValueError) as error:
        assert op.name in str(error) and words in str(error), error
    else:
        raise AssertionError("it was taken")


# ---- functions around the ops ------------------------------------------------------------------------


def add_kernels() -> None:
    """For every op one that zeroes its result."""
    for op in OPS:

        def run(*call: Any, op: Any = op) -> None:
            out = call[op.output_index]
            if isinstance(out, Permuted):
                out.inverse.fill_(-1)
                out = (out.x, out.layout.starts, out.layout.counts)
            for x in tree_leaves(tuple(out) if isinstance(out, (tuple, ScaledTensor)) else out):
                for part in x if isinstance(x, ScaledTensor) else (x,):
                    part.zero_()

        run.__signature__ = inspect.signature(op.reference)  # type: ignore[attr-defined]
        op.add(Kernel(f"{KIND}.zeros", run, KIND))


def pair(x: ScaledTensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.data, x.scale


def layouts() -> None:
    GroupedLayout(numbers(0, 9), numbers(HUGE, -1), 5, check=False).indices()
    GroupedLayout.from_counts(numbers(1, 2), 128, rows=256, check=False)
    GroupedLayout.from_offsets(numbers(0, 3, 2), rows=5, check=False).indices()
    GroupedLayout.from_ends(numbers(3, 2), 2, rows=5, check=False)
    layout = GroupedLayout.from_indices(numbers(HUGE, 1, 0, -HUGE), 2, alignment=1, check=False)
    layout.indices()
    GroupedLayout.from_masked(numbers(9, -1), 5, check=False).indices()


def checked_layouts() -> None:
    for make in (
        lambda: GroupedLayout(numbers(0), numbers(1), 5),
        lambda: GroupedLayout.from_counts(numbers(1, 2), rows=256),
        lambda: GroupedLayout.from_counts(numbers(1, 2), check=False),
        lambda: GroupedLayout.from_offsets(numbers(0, 3), rows=5),
        lambda: GroupedLayout.from_ends(numbers(3), rows=5),
        lambda: GroupedLayout.from_indices(numbers(0), 2, alignment=1),
        lambda: GroupedLayout.from_masked(numbers(1), 5),
        lambda: contiguous().slices(),
        lambda: repr(contiguous()),
    ):
        try:
            make()
        except Waited:
            continue
        raise AssertionError("it did not wait")


def batched() -> None:
    out = moekern.batched_experts(floats(E, 5, H), experts(), numbers(9, 0, -1, 5))
    assert is_on(out)
    try:
        moekern.batched_experts(floats(E, 5, H), experts(), torch.zeros(E, dtype=torch.int32))
    except ValueError as error:
        assert "counts is on cpu" in str(error), error
    else:
        raise AssertionError("counts on the host were taken")


def workspace() -> None:
    assert moekern.fused_experts_workspace(T, TOPK, experts(), shared=experts()) == 0


def of_deep_gemm() -> None:
    a, b, d = pair(fp8(ROWS, H)), pair(weight(E, I, H)), floats(ROWS, I)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, numbers(*[0] * 3, -1, HUGE, *[3] * 7))
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, numbers(3, 3, 5, 9), use_psum_layout=True)
    deep_gemm.m_grouped_fp8_gemm_nt_masked(pair(fp8(E, 5, H)), b, floats(E, 5, I), numbers(3, 0, 9, 2), 3)
    a, b = pair(columns(512, H)), pair(columns(512, I))
    out, ks = floats32(E, H, I), [128] * 4
    deep_gemm.k_grouped_fp8_gemm_tn_contiguous(a, b, out, ks, numbers(*ks))
    deep_gemm.k_grouped_fp8_gemm_tn_contiguous(a, b, out, ks, numbers(128, 256, 384, 512), out, use_psum_layout=True)
    deep_gemm.fp8_gemm_nt(pair(fp8(T, H)), pair(weight(I, H)), floats(T, I))


def of_vllm() -> None:
    assert is_on(vllm.fused_topk(floats(T, H), floats(T, 8), TOPK, True)[2])
    vllm.grouped_topk(floats(T, H), floats(T, 8), TOPK, True, 4, 2)
    for options in ({}, {"expert_map": numbers(0, -1, 1, -1)}):
        for ignore in (False, True):
            vllm.moe_align_block_size(ids(HUGE), 16, E, ignore_invalid_experts=ignore, **options)
    x = fp8(T, H)
    vllm.moe_permute(x.data, x.scale, ids(), E, permuted_hidden_states=fp8(ROWS, H).data)
    inverse = vllm.moe_permute(floats(T, H), None, ids(), E, 2, numbers(0, -1, 1, -1))[3]
    vllm.moe_unpermute(floats(T, H), floats(ROWS, H), floats(T, TOPK), inverse)


def of_transformers() -> None:
    transformers._is_ours = lambda x: True
    w, x = weight(E, I, H), floats(T, H)
    transformers.grouped_matmul(x, w.data, w.scale, offsets=numbers(1, 2, 3, 6), block_size=(128, 128))
    transformers.batched_matmul(x, w.data, w.scale, expert_ids=numbers(*[HUGE] * T), block_size=(128, 128))


def operators() -> None:
    """What runs under a compiler or records gradients."""
    from moekern import library

    starts, counts = numbers(0, 3, 5, 9, dtype=torch.int64), numbers(3, 2, HUGE, -1, dtype=torch.int64)
    b = columns(ROWS, I)
    library._k_grouped(floats(ROWS, H), None, [1, 1], b.data, b.scale, [128, 1], starts, counts, ROWS, None, None)
    library._permute(floats(T, H), None, [1, 1], ids(HUGE), E, 1, None, None, False)

    class Context:
        saved_tensors = floats(ROWS, H), ids(HUGE), floats(T, TOPK)
        needs_input_grad = (True, False, True, False)

    library._unpermute_backward(Context, floats(T, H))


AROUND = {
    f.__name__: f
    for f in (
        layouts, checked_layouts, batched, workspace, of_deep_gemm, of_vllm, of_transformers, operators
    )
}  # fmt: skip
CASES: dict[str, Callable[[], Any]] = {
    **{f"prepared: {name}": lambda make=make: prepared(make) for name, make in CALLS.items()},  # type: ignore[misc]
    **{f"refused: {name}": lambda row=row: refused(*row) for name, row in REFUSALS.items()},  # type: ignore[misc]
    **{f"around: {name}": lambda f=f: (add_kernels(), f()) for name, f in AROUND.items()},  # type: ignore[misc]
}

# Which must not get through. `check_layout` is for the CPU, and asks nobody.
LOOKS: dict[str, Callable[[], Any]] = {
    "c++": lambda: moekern._C.check_layout(numbers(0, dtype=torch.int64), numbers(0, dtype=torch.int64), 1, 1, None),
    "python": lambda: floats(1).item(),
}


def covered(kind: str) -> set[str]:
    """The ops of the cases of a kind."""
    makes = [*CALLS.values()] if kind == "prepared" else [make for _, make in REFUSALS.values()]
    with Accelerator():
        return {make()[0].name for make in makes}


def main() -> None:
    faulthandler.enable()
    if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        del torch.Tensor.__dlpack_c_exchange_api__
    moekern.runtime.connect(1)  # type: ignore[attr-defined]
    dispatcher.register_device(WHERE, Device(KIND, "none"))
    for name, case in ({name: LOOKS[name] for name in sys.argv[1:]} or CASES).items():
        sys.stdout.flush()
        child = os.fork()
        if child:
            status = os.waitpid(child, 0)[1]
            if os.WIFSIGNALED(status):
                print(f"{name}\tsignal {os.WTERMSIG(status)}")
            continue
        try:
            with Accelerator():
                case()
            print(f"{name}\tok")
        except BaseException as error:
            sys.excepthook(*sys.exc_info())
            print(f"{name}\t{type(error).__name__}: {error}".replace("\n", " "))
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
