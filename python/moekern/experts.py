"""ExpertWeights: the weights of a layer's experts, checked once and used where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple
from weakref import WeakValueDictionary

import torch

from moekern import _C
from moekern.scaled import FORMATS, ScaledTensor, as_tensor, infer_block

Matrices = Any  # a stack (data [E, rows, columns], scale[, block]), or a matrix (data, scale) for every expert


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

    w13: gate over up, [2 I, H] of every expert: a stack (data [E, 2 I, H], scale [E, ...]), or a list of E
        ScaledTensors or (data, scale) pairs. Formats e4m3fn, e5m2 and e4m3fnuz; scales float32 or ue8m0 in any
        grid that a ScaledTensor takes. A stack's block is inferred, unless it is (data, scale, block).
    w2: down, [H, I] of every expert, likewise.
    b13, b2: biases [E, 2 I] and [E, H] in float32, float16 or bfloat16, or lists of one vector for every expert.
    interleaved: rows 0, 2, ... of w13 and b13 are gate, rows 1, 3, ... are up (gpt-oss).
    split_scales: gate and up have scale grids of their own, one above the other: with I = 192, two rows of
        128x128 blocks each, where one grid for both has three.

    `ExpertWeights.separate` takes gate and up in matrices of their own. Nothing is copied: the tensors are kept,
    and read where they lie, in a mapped file too. All experts have one format, block and scale dtype, and so
    have gate and up. Raises ValueError or TypeError naming the argument.
    """

    alive: ClassVar[WeakValueDictionary[int, ExpertWeights]] = WeakValueDictionary()  # by id(tensors[0])

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
        interleaved, b13, b2 = next(flags), next(flags), next(flags)
        names = ("w13", "w2") if len(layout) == 11 else ("gate", "up", "down")
        sources = []
        for name in names:
            count, rows, columns, grids = (next(flags) for _ in range(4))
            data, scale = ([next(rest) for _ in range(count)] for _ in range(2))
            sources.append(_Source(name, data, scale, (rows, columns), grids))
        self = cls.__new__(cls)
        biases = [[next(rest) for _ in range(count)] for count in (b13, b2)]
        self._build(tuple(sources), *biases, interleaved=bool(interleaved))
        return self

    def projections(self) -> list[tuple[tuple[ScaledTensor, torch.Tensor | None], ...]]:
        """(matrix, bias) of every expert's gate, up and down. up begins in row `up_first` of its matrix."""
        biases = (b or [None] * self.num_experts for b in self._biases)
        columns = [
            zip(matrices, bias, strict=True)
            for matrices, bias in zip((self._gate, self._up, self._down), biases, strict=True)
        ]
        return list(zip(*columns, strict=True))

    def expert(self, index: int) -> Expert:
        """The values of one expert, for references."""
        gate, up, down = (matrices[index].to_float64() for matrices in (self._gate, self._up, self._down))
        size = self.intermediate_size
        biases = [None if b is None else b[index].to(torch.float64) for b in self._biases]
        return Expert(gate[:size], up[self.up_first : self.up_first + size], down, *biases)

    def _build(
        self, sources: tuple[_Source, ...], b13: list[torch.Tensor], b2: list[torch.Tensor], interleaved: bool
    ) -> None:
        first = sources[0]
        rows, hidden = first.shape
        halves = 2 if len(sources) == 2 else 1
        if not rows or not hidden or rows % halves:
            raise ValueError(
                f"ExpertWeights: {first.name} has shape {[rows, hidden]}; its matrices need columns and "
                f"{'an even number of' if halves == 2 else ''} rows"
            )
        size = rows // halves
        for source in sources:
            source.check(first, (hidden, size) if source is sources[-1] else (rows, hidden))
        self.num_experts, self.hidden_size, self.intermediate_size = first.experts, hidden, size
        self._gate, self._up, self.up_first = _gate_and_up(sources, interleaved)
        self._down = sources[-1].matrices()
        of_gate, of_up = _halves(_each("b13", b13, self.num_experts, 2 * size), size, interleaved)
        self._biases = of_gate, of_up, _each("b2", b2, self.num_experts, hidden)
        names = (first.name, sources[-2].name, sources[-1].name)
        self.table = _C.ExpertTable(names, self._gate, self._up, self._down, *self._biases, self.up_first, size, hidden)
        self.tensors = [t for source in sources for t in (*source.data, *source.scale)] + b13 + b2
        grids = [x for source in sources for x in (len(source.data), *source.block, source.grids)]
        self.layout = (int(interleaved), len(b13), len(b2), *grids)
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
                    f"ExpertWeights: {self.name} has a matrix of shape {list(data.shape[-2:])}; it must be {list(shape)}"
                )

    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(data, scale) of every expert."""
        if self.stacked:
            return list(zip(self.data[0].unbind(), self.scale[0].unbind(), strict=True))
        return list(zip(self.data, self.scale, strict=True))

    def scaled(self, data: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> ScaledTensor:
        try:
            return ScaledTensor(data, scale, block)
        except (TypeError, ValueError) as error:
            raise type(error)(f"ExpertWeights: {self.name}.{error}") from None

    def matrices(self) -> list[ScaledTensor]:
        return [self.scaled(data, scale, self.block) for data, scale in self.pairs()]


def _gate_and_up(sources: tuple[_Source, ...], interleaved: bool) -> tuple[list[ScaledTensor], list[ScaledTensor], int]:
    """Matrices that hold gate and up of every expert, and the row at which up begins."""
    if len(sources) == 3:
        return sources[0].matrices(), sources[1].matrices(), 0
    source = sources[0]
    size = source.shape[0] // 2
    if interleaved:
        parts = [[_every_other(source, *pair, row) for pair in source.pairs()] for row in (0, 1)]
        return parts[0], parts[1], 0
    if source.grids == 1:
        whole = source.matrices()
        return whole, whole, size
    gate, up = [], []
    for data, scale in source.pairs():
        own = scale.shape[0] // 2
        gate.append(source.scaled(data[:size], scale[:own], source.block))
        up.append(source.scaled(data[size:], scale[own:], source.block))
    return gate, up, 0


def _every_other(source: _Source, data: torch.Tensor, scale: torch.Tensor, first: int) -> ScaledTensor:
    """Rows first, first + 2, ... of an interleaved matrix, whose scale blocks have half the rows then."""
    rows, columns = source.block
    if rows == 1:
        return source.scaled(data[first::2], scale[first::2], (1, columns))
    if rows < len(data) and rows % 2:
        raise ValueError(
            f"ExpertWeights: {source.name} has scale blocks of {rows} rows; interleaved gate and up need one or an even "
            "number"
        )
    return source.scaled(
        data[first::2], scale, (max(rows // 2, len(data) // 2) if rows >= len(data) else rows // 2, columns)
    )


def _halves(
    biases: list[torch.Tensor] | None, size: int, interleaved: bool
) -> tuple[list[torch.Tensor] | None, list[torch.Tensor] | None]:
    if biases is None:
        return None, None
    if interleaved:
        return [b[0::2] for b in biases], [b[1::2] for b in biases]
    return [b[:size] for b in biases], [b[size:] for b in biases]


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
            f"ExpertWeights: {name} has shapes {sorted({tuple(x.shape) for x in tensors})}; it is [{experts}, {elements}], "
            f"or {experts} vectors of {elements}"
        )
    return vectors


def _source(name: str, value: Matrices, grids: int = 1) -> _Source:
    if not isinstance(value, (tuple, list)) or not value:
        raise TypeError(
            f"ExpertWeights: {name} is a {type(value).__name__}; it is a stack (data [E, rows, columns], scale), or a "
            "list of a ScaledTensor or (data, scale) pair for every expert"
        )
    if isinstance(value[0], torch.Tensor):
        return _stack(name, value, grids)
    matrices = [_matrix(f"ExpertWeights: {name}[{e}]", x, grids) for e, x in enumerate(value)]
    if len({block for *_, block in matrices}) > 1:
        raise ValueError(f"ExpertWeights: {name} has scale blocks {sorted({b for *_, b in matrices})}; one is for all")
    return _Source(name, [data for data, *_ in matrices], [scale for _, scale, _ in matrices], matrices[0][2], grids)


def _stack(name: str, value: Sequence[Any], grids: int) -> _Source:
    if len(value) not in (2, 3):
        raise TypeError(
            f"ExpertWeights: {name} has {len(value)} parts; a stack is (data, scale) or (data, scale, block)"
        )
    what = f"ExpertWeights: {name}"
    data, scale = _fp8(what, value[0]), as_tensor(value[1], f"{what}.scale").detach()
    if data.dim() != 3 or not len(data):
        raise ValueError(f"{what} has shape {list(data.shape)}; a stack is [experts, rows, columns]")
    if scale.dim() not in (1, 2, 3) or len(scale) != len(data):
        raise ValueError(
            f"{what}.scale has shape {list(scale.shape)}; data {list(data.shape)} needs a grid for each expert"
        )
    scale = scale.reshape(*scale.shape, *[1] * (3 - scale.dim()))
    block = value[2] if len(value) == 3 else _block(what, data[0], scale[0], grids)
    return _Source(name, [data], [scale], block, grids)


def _matrix(what: str, value: Any, grids: int) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    if isinstance(value, ScaledTensor):
        return value.data.detach(), value.scale.detach(), value.block
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{what} is a {type(value).__name__}; it is a ScaledTensor or a (data, scale) pair")
    data, scale = _fp8(what, value[0]), as_tensor(value[1], f"{what}.scale").detach()
    if data.dim() != 2 or scale.dim() > 2:
        raise ValueError(f"{what} has shape {list(data.shape)} and scale {list(scale.shape)}; both are matrices")
    scale = scale if scale.dim() == 2 else scale.reshape(-1, 1)
    return data, scale, _block(what, data, scale, grids)


def _fp8(what: str, value: Any) -> torch.Tensor:
    data = as_tensor(value, what).detach()
    if data.dtype not in FORMATS:
        raise TypeError(
            f"{what} has dtype {data.dtype}; experts are {', '.join(map(str, FORMATS))} with scales: "
            "moekern.per_block_cast_to_fp8 makes them"
        )
    return data


def _block(what: str, data: torch.Tensor, scale: torch.Tensor, grids: int) -> tuple[int, int]:
    """The block of a matrix whose rows have `grids` grids, one above the other."""
    (rows, columns), (grid_rows, grid_columns) = data.shape, scale.shape
    if rows % grids or grid_rows % grids:
        raise ValueError(f"{what} has {rows} rows and {grid_rows} rows of scales; halves need an even number of both")
    try:
        return infer_block((rows // grids, columns), (grid_rows // grids, grid_columns))
    except ValueError as error:
        raise ValueError(f"{what}.{error}") from None
