"""ExpertWeights: the weights of a layer's experts, checked once and used where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple
from weakref import WeakValueDictionary

import torch

from moekern import _C
from moekern.scaled import FORMATS, ScaledTensor, as_scaled, as_tensor, infer_block

_NEEDED = (
    f"experts are {', '.join(map(str, FORMATS))} with scales, as moekern.per_block_cast_to_fp8 makes them of others"
)
Matrices = Any  # a stack, as ScaledTensor or (data, scale), or a matrix of that kind for every expert


class Expert(NamedTuple):
    """The exact values of one expert, in float64."""

    gate: torch.Tensor  # [I, H]
    up: torch.Tensor  # [I, H]
    down: torch.Tensor  # [H, I]
    gate_bias: torch.Tensor | None
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None


class ExpertWeights:
    """The FP8 weights of a Mixture-of-Experts layer: a gate, an up and a down projection of every expert.

    w13: gate over up, [2 I, H] of every expert: a stack, ScaledTensor [E, 2 I, H] or (data, scale), or a list of E
        ScaledTensors or (data, scale) pairs. Formats e4m3fn, e5m2 and e4m3fnuz; scales float32 or ue8m0, in any
        grid that a ScaledTensor takes.
    w2: down, [H, I] of every expert, likewise.
    b13, b2: biases [E, 2 I] and [E, H] in float32, float16 or bfloat16, or lists of one vector for every expert.
    interleaved: rows 0, 2, ... of w13 and b13 are gate, rows 1, 3, ... are up (gpt-oss).
    split_scales: gate and up have scale grids of their own, one above the other, in (data, scale): with I = 192, two
        rows of 128x128 blocks each, where one grid for both has three.

    `ExpertWeights.separate` takes gate and up in matrices of their own. Nothing is copied: weights are read where
    they lie, in a mapped file too, and kept as they are now, even if their owners are given other memory. All
    experts have one format, block and scale dtype, and so have gate and up.

    Raises ValueError or TypeError naming the argument.
    """

    alive: ClassVar[WeakValueDictionary[int, ExpertWeights]] = WeakValueDictionary()  # by id(tensors[0])
    table: object  # addresses for native kernels; None under a compiler, which has none
    places: Any = None  # the same on a device, made there by the first kernel that wants it

    def __init__(
        self,
        w13: Matrices,
        w2: Matrices,
        *,
        b13: Any = None,
        b2: Any = None,
        interleaved: bool = False,
        split_scales: bool = False,
    ) -> None:
        if interleaved and split_scales:
            raise ValueError("ExpertWeights: split_scales is for halves, but w13 is interleaved")
        sources = _source("w13", w13, grids=2 if split_scales else 1), _source("w2", w2)
        self._build(sources, _vectors("b13", b13), _vectors("b2", b2), interleaved)

    @classmethod
    def separate(
        cls, gate: Matrices, up: Matrices, down: Matrices, *, b13: Any = None, b2: Any = None
    ) -> ExpertWeights:
        """From gate and up, [I, H] of every expert, and down, [H, I], each a stack or a list.

        b13 holds gate's biases before up's.
        """
        self = cls.__new__(cls)
        sources = _source("gate", gate), _source("up", up), _source("down", down)
        self._build(sources, _vectors("b13", b13), _vectors("b2", b2), interleaved=False)
        return self

    @classmethod
    def from_tensors(cls, tensors: Sequence[torch.Tensor], layout: Sequence[int]) -> ExpertWeights:
        """The weights whose `tensors` and `layout` these are: in that form they pass through torch.library."""
        rest, flags = iter(tensors), iter(layout)
        interleaved, b13, b2, parts = (next(flags) for _ in range(4))
        sources = []
        for name in ("w13", "w2") if parts == 2 else ("gate", "up", "down"):
            count, rows, columns, grids = (next(flags) for _ in range(4))
            data, scale = ([next(rest) for _ in range(count)] for _ in range(2))
            sources.append(_Source(name, data, scale, (rows, columns), grids))
        of_w13, of_w2 = ([next(rest) for _ in range(count)] for count in (b13, b2))
        self = cls.__new__(cls)
        self._build(tuple(sources), of_w13, of_w2, bool(interleaved))
        return self

    @classmethod
    def from_table(cls, table: object) -> ExpertWeights:
        """What native kernels need of one whose `table` this is, and no more; its memory must be held elsewhere."""
        self = cls.__new__(cls)
        self.table = table
        return self

    def __repr__(self) -> str:
        first = self._projections[0][0]
        return (
            f"ExpertWeights({self.num_experts} experts of {self.hidden_size} x {self.intermediate_size}, "
            f"{first.format} in blocks of {first.block})"
        )

    def projections(self) -> list[tuple[tuple[ScaledTensor, torch.Tensor | None], ...]]:
        """(matrix, bias) of every expert's gate, up and down. up begins in row `up_first` of its matrix."""
        none = [None] * self.num_experts
        columns = [
            list(zip(matrices, biases or none, strict=True))
            for matrices, biases in zip(self._projections, self._biases, strict=True)
        ]
        return list(zip(*columns, strict=True))

    def expert(self, index: int) -> Expert:
        """The values of one expert, for references."""
        gate, up, down = (matrices[index].to_float64() for matrices in self._projections)
        biases = (None if b is None else b[index].to(torch.float64) for b in self._biases)
        size = self.intermediate_size
        return Expert(gate[:size], up[self.up_first : self.up_first + size], down, *biases)

    def _build(
        self, sources: tuple[_Source, ...], b13: list[torch.Tensor], b2: list[torch.Tensor], interleaved: bool
    ) -> None:
        first, down = sources[0], sources[-1]
        rows, hidden = first.shape
        halves = 2 if len(sources) == 2 else 1
        if not rows or not hidden or rows % halves:
            raise ValueError(
                f"ExpertWeights: {first.name} has matrices of shape {[rows, hidden]}; they need columns and "
                f"{'an even number of ' if halves == 2 else ''}rows"
            )
        size = rows // halves
        for source in sources:
            source.check(first, (hidden, size) if source is down else (rows, hidden))
        self.num_experts, self.hidden_size, self.intermediate_size = first.experts, hidden, size
        gate, up, self.up_first = _gate_and_up(sources, interleaved)
        self._projections = gate, up, down.matrices()
        each = [_each("b13", b13, self.num_experts, 2 * size), _each("b2", b2, self.num_experts, hidden)]
        self._biases = *_halves(each[0], size, interleaved), each[1]
        self.tensors = [t for source in sources for t in (*source.data, *source.scale)] + b13 + b2
        grids = [x for source in sources for x in (len(source.data), *source.block, source.grids)]
        self.layout = (int(interleaved), len(b13), len(b2), len(sources), *grids)
        self.table = None
        if not torch.compiler.is_compiling() and type(self.tensors[0]) is torch.Tensor:
            names = (first.name, sources[-2].name, down.name)
            self.table = _C.expert_table(names, *self._projections, *self._biases, self.up_first, size, hidden)
            ExpertWeights.alive[id(self.tensors[0])] = self


class _Source(NamedTuple):
    """The tensors of one argument: a stack, or a matrix for every expert."""

    name: str
    data: list[torch.Tensor]
    scale: list[torch.Tensor]
    block: tuple[int, int]
    grids: int  # of scales, one above the other, for equal parts of the rows

    @property
    def stacked(self) -> bool:
        return self.data[0].dim() == 3

    @property
    def experts(self) -> int:
        return len(self.data[0]) if self.stacked else len(self.data)

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.data[0].shape[-2:]
        return rows, columns

    def check(self, first: _Source, shape: tuple[int, int]) -> None:
        if self.experts != first.experts:
            raise ValueError(f"ExpertWeights: {self.name} has {self.experts} experts; {first.name} has {first.experts}")
        for data in self.data:
            if tuple(data.shape[-2:]) != shape:
                raise ValueError(
                    f"ExpertWeights: {self.name} has a matrix of shape {list(data.shape[-2:])}; {list(shape)} is needed"
                )

    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(data, scale) of every expert."""
        if not self.stacked:
            return list(zip(self.data, self.scale, strict=True))
        try:
            return list(zip(self.data[0].unbind(), self.scale[0].unbind(), strict=True))
        except RuntimeError as error:  # whose storage is empty
            raise ValueError(f"ExpertWeights: {self.name} cannot be read: {error}") from None

    def scaled(self, data: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> ScaledTensor:
        try:
            return ScaledTensor(data, scale, block)
        except (TypeError, ValueError) as error:
            raise type(error)(f"ExpertWeights: {self.name}.{error}") from None

    def matrices(self) -> list[ScaledTensor]:
        return [self.scaled(data, scale, self.block) for data, scale in self.pairs()]


def _source(name: str, value: Matrices, grids: int = 1) -> _Source:
    what = f"ExpertWeights: {name}"
    if _is_one(value):
        data, scale, block = _parts(what, value, grids)
        if data.dim() != 3 or not len(data):
            raise ValueError(f"{what} has shape {list(data.shape)}; a stack is [experts, rows, columns]")
        return _Source(name, [data], [scale], block, grids)
    if isinstance(value, torch.Tensor):
        raise TypeError(f"{what} is a tensor of {value.dtype} without scales; {_NEEDED}")
    if not isinstance(value, (tuple, list)) or not value:
        has = "empty" if isinstance(value, (tuple, list)) else f"a {type(value).__name__}"
        raise TypeError(
            f"{what} is {has}; it is a stack, as ScaledTensor or (data, scale), or a list of such matrices, one for "
            "every expert"
        )
    found = [_parts(f"{what}[{e}]", x, grids) for e, x in enumerate(value)]
    for e, (data, _, block) in enumerate(found):
        if data.dim() != 2 or block != found[0][2]:
            raise ValueError(
                f"{what}[{e}] has shape {list(data.shape)} and blocks of {block}; in a list every expert is a matrix, "
                f"and all have blocks of {found[0][2]}"
            )
    return _Source(name, [data for data, *_ in found], [scale for _, scale, _ in found], found[0][2], grids)


def _is_one(value: Any) -> bool:
    """Whether this is a (data, scale) of some kind, not a list of them."""
    if isinstance(value, ScaledTensor):
        return True
    return (
        isinstance(value, (tuple, list)) and len(value) == 2 and not isinstance(value[0], (ScaledTensor, tuple, list))
    )


def _parts(what: str, value: Any, grids: int) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    """(data, scale, block) of a matrix or of a stack, aliases that keep their memory."""
    if not _is_one(value):
        raise TypeError(f"{what} is a {type(value).__name__}; it is a ScaledTensor or a (data, scale) pair")
    if isinstance(value, ScaledTensor):
        if grids == 2:
            raise TypeError(f"{what} is a ScaledTensor, which has one scale grid; split_scales takes (data, scale)")
        return value.data.detach(), value.scale.detach(), value.block
    data, scale = as_tensor(value[0], what).detach(), as_tensor(value[1], f"{what}.scale").detach()
    if data.dtype not in FORMATS:
        raise TypeError(f"{what} has dtype {data.dtype}; {_NEEDED}")
    if data.dim() == 3 and scale.dim() in (1, 2):  # a scale for every expert, or for each of its rows
        scale = scale.reshape(*scale.shape, *[1] * (3 - scale.dim()))
    if grids == 1:
        x = as_scaled((data, scale), what)
        return x.data, x.scale, x.block
    rows, columns = data.shape[-2:]
    if data.dim() != scale.dim() or data.shape[:-2] != scale.shape[:-2] or rows % grids or scale.shape[-2] % grids:
        raise ValueError(
            f"{what} has shape {list(data.shape)} and scale {list(scale.shape)}; each half of the rows needs a grid"
        )
    try:
        return data, scale, infer_block((rows // grids, columns), (scale.shape[-2] // grids, scale.shape[-1]))
    except ValueError as error:
        raise ValueError(f"{what}.{error}") from None


def _gate_and_up(sources: tuple[_Source, ...], interleaved: bool) -> tuple[list[ScaledTensor], list[ScaledTensor], int]:
    """Matrices that hold gate and up of every expert, and the row at which up begins."""
    if len(sources) == 3:
        return sources[0].matrices(), sources[1].matrices(), 0
    source = sources[0]
    size = source.shape[0] // 2
    if interleaved:
        gate, up = ([_every_other(source, row, *pair) for pair in source.pairs()] for row in (0, 1))
        return gate, up, 0
    if source.grids == 1:
        whole = source.matrices()
        return whole, whole, size
    gate, up = [], []
    for data, scale in source.pairs():
        own = scale.shape[0] // 2
        gate.append(source.scaled(data[:size], scale[:own], source.block))
        up.append(source.scaled(data[size:], scale[own:], source.block))
    return gate, up, 0


def _every_other(source: _Source, first: int, data: torch.Tensor, scale: torch.Tensor) -> ScaledTensor:
    """Rows first, first + 2, ... of an interleaved matrix: a block of scales has half as many of them."""
    rows, columns = source.block
    if rows == 1:
        return source.scaled(data[first::2], scale[first::2], (1, columns))
    if rows >= len(data):
        rows = len(data)  # one row of blocks, however tall
    if rows % 2:
        raise ValueError(
            f"ExpertWeights: {source.name} has blocks of {source.block}; of interleaved gate and up a block has one "
            "row, or an even number"
        )
    return source.scaled(data[first::2], scale, (rows // 2, columns))


def _vectors(name: str, value: Any) -> list[torch.Tensor]:
    """The tensors of a bias argument: none, a stack, or a vector for every expert."""
    values = [] if value is None else value if isinstance(value, (list, tuple)) else [value]
    return [as_tensor(x, f"ExpertWeights: {name}").detach() for x in values]


def _each(name: str, tensors: list[torch.Tensor], experts: int, elements: int) -> list[torch.Tensor] | None:
    """One vector for every expert."""
    if not tensors:
        return None
    vectors = list(tensors[0].unbind()) if len(tensors) == 1 and tensors[0].dim() == 2 else tensors
    if len(vectors) != experts or any(tuple(v.shape) != (elements,) for v in vectors):
        raise ValueError(
            f"ExpertWeights: {name} has shapes {sorted({tuple(x.shape) for x in tensors})}; it is "
            f"[{experts}, {elements}], or {experts} vectors of {elements}"
        )
    return vectors


def _halves(
    biases: list[torch.Tensor] | None, size: int, interleaved: bool
) -> tuple[list[torch.Tensor] | None, list[torch.Tensor] | None]:
    if biases is None:
        return None, None
    if interleaved:
        return [b[0::2] for b in biases], [b[1::2] for b in biases]
    return [b[:size] for b in biases], [b[size:] for b in biases]
