"""The native module (csrc/bindings/). Only moekern itself calls it."""

from collections.abc import Callable
from typing import Any, TypedDict

import torch

from moekern.layout import GroupedLayout
from moekern.scaled import ScaledTensor
from moekern.weights import GroupedWeights

class _NativeBackend(TypedDict):
    features: Callable[[], frozenset[str]]
    thread_team: Callable[[], str]  # of backends whose kernels run on threads of the process
    # {op: [(name, needs, run, refuses, workspace -> bytes)]}, best first; the functions take the op's parameters
    kernels: dict[
        str,
        list[
            tuple[str, frozenset[str], Callable[..., None], Callable[..., str | None] | None, Callable[..., int] | None]
        ],
    ]
    # (name, needs, multiply_add -> floating-point operations done, [read(x)], copy(x, out)); for bench/
    limits: list[
        tuple[
            str,
            frozenset[str],
            Callable[[], int],
            list[Callable[[torch.Tensor], None]],
            Callable[[torch.Tensor, torch.Tensor], None],
        ]
    ]
    # of backends whose kernels a driver loads
    modules: Callable[[], dict[str, tuple[bytes, list[str]]]]  # {name: (code, [kernel])}
    use_driver: Callable[[str | None], None]  # the library to use from now on; None: the vendor's
    why_no_driver: Callable[[], str]  # empty: it can run the modules

compiler: str
native: dict[str, _NativeBackend]

def connect(
    scaled_tensor: type[ScaledTensor],
    tensor: type[torch.Tensor],
    num_threads: Callable[[], int],
    read: Callable[[torch.Tensor], tuple[int, list[int], list[int], str, int]],
    allocate: Callable[[torch.Tensor, tuple[int, ...], str], torch.Tensor],
    current_stream: Callable[[int, int], int],
    dtypes: dict[torch.dtype, str],
    /,
) -> None: ...
def uses_exchange_table() -> bool: ...
def prepare_gemm(
    a: torch.Tensor | ScaledTensor,
    b: ScaledTensor,
    c: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    /,
) -> tuple[Any, ...]: ...
def weight_table(
    op: str, name: str, data: list[torch.Tensor], scale: list[torch.Tensor], block_rows: int, block_cols: int, /
) -> object: ...  # a capsule
def check_layout(
    starts: torch.Tensor, counts: torch.Tensor, rows: int, alignment: int, capacity: int | None, /
) -> None: ...
def prepare_m_grouped(
    masked: bool,
    a: torch.Tensor | ScaledTensor,
    b: ScaledTensor | GroupedWeights,
    layout: GroupedLayout,
    out: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    /,
) -> tuple[Any, ...]: ...
def prepare_k_grouped(
    a: torch.Tensor | ScaledTensor,
    b: ScaledTensor,
    layout: GroupedLayout,
    c: torch.Tensor | None,
    out: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    /,
) -> tuple[Any, ...]: ...
def prepare_cast(
    op: str,
    x: torch.Tensor,
    out: ScaledTensor | None,
    format: str,
    block_rows: int,
    block_cols: int,
    gated: bool,
    /,
) -> tuple[torch.Tensor, ScaledTensor]: ...
def expert_table(
    names: tuple[str, str, str],
    gate: list[ScaledTensor],
    up: list[ScaledTensor],
    down: list[ScaledTensor],
    gate_bias: list[torch.Tensor] | None,
    up_bias: list[torch.Tensor] | None,
    down_bias: list[torch.Tensor] | None,
    up_first: int,
    intermediate: int,
    hidden: int,
    /,
) -> object: ...  # a capsule
def prepare_experts(*call: Any) -> tuple[Any, ...]: ...
def prepare_dequantize(
    x: ScaledTensor, out: torch.Tensor | None, out_dtype: torch.dtype | None, /
) -> tuple[ScaledTensor, torch.Tensor]: ...
def prepare_gate(
    logits: torch.Tensor,
    topk: int,
    sigmoid: bool,
    correction_bias: torch.Tensor | None,
    groups: int,
    kept_groups: int,
    routed_scaling_factor: float,
    mask_value: float,
    out: tuple[torch.Tensor, torch.Tensor] | None,
    /,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def prepare_permute(
    x: torch.Tensor | ScaledTensor,
    ids: torch.Tensor,
    experts: int,
    alignment: int,
    expert_map: torch.Tensor | None,
    format: str | None,
    rows: int,
    out: tuple[Any, Any, torch.Tensor] | None,
    /,
) -> tuple[torch.Tensor | ScaledTensor, torch.Tensor, torch.Tensor, torch.Tensor]: ...  # x, inverse, starts, counts
def prepare_unpermute(
    y: torch.Tensor,
    inverse: torch.Tensor,
    weights: torch.Tensor | None,
    out: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    /,
) -> torch.Tensor: ...

class ValueError(Exception): ...
class TypeError(Exception): ...
