"""The problems of fused_experts, as data, and the operands that a problem stands for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from moekern.experts import ExpertWeights
from moekern.ops.quantize import round_to_fp8
from moekern.scaled import DTYPES, ScaledTensor
from moekern.testing.cases import FLOATS, VALUES, fp8_data, place, scale_grid
from moekern.testing.moe_models import routing

FORMS = ("stack", "list", "separate", "separate stacks", "split", "interleaved")


@dataclass(frozen=True)
class Experts:
    """One call of fused_experts: x [tokens, hidden], `experts` of [intermediate, hidden], `top_k` for each token."""

    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    x: str = "bf16"  # a float dtype, or an FP8 format with 1x128 scales
    weight: str = "e4m3fn"
    quantize: bool = False
    block: tuple[int, int] = (128, 128)  # 0 is the whole extent of gate, up or down
    scale: str = "f32"  # or "ue8m0"
    form: str = "stack"
    bias: str | None = None  # a dtype
    activation: str = "swiglu"
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None
    on_input: bool = False
    reduce: bool = True
    shared: int = 0
    shared_size: int | None = None  # their intermediate size, if it is another
    mapped: bool = False  # ids are of twice as many experts, of which every other lives here
    routing: str = "even"
    index: str = "i64"
    out: str | None = None
    layout_x: str = "rows"
    layout_w: str = "rows"
    layout_out: str = "rows"
    values: str = "normal"

    def __str__(self) -> str:
        head = f"{self.tokens}x{self.hidden}x{self.intermediate}-{self.top_k}of{self.experts}"
        changed = (f for f in fields(self)[5:] if getattr(self, f.name) != f.default)
        return "-".join([head, *(f"{f.name}={getattr(self, f.name)}".replace(" ", "") for f in changed)])

    @property
    def w8a8(self) -> bool:
        return self.quantize or self.x in DTYPES

    @property
    def out_dtype(self) -> torch.dtype:
        return FLOATS[self.out or (self.x if self.x in FLOATS else "bf16")]


@dataclass(frozen=True)
class Operands:
    x: torch.Tensor | ScaledTensor
    experts: ExpertWeights
    ids: torch.Tensor
    weights: torch.Tensor
    options: dict[str, Any]

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.x, self.experts, self.ids, self.weights


def operands(case: Experts, seed: int = 0) -> Operands:
    g = torch.Generator().manual_seed(seed)
    draw = (_Exact if case.values == "integers" else _Random)(case, g)
    x = draw.x()
    if case.x in DTYPES:
        x = ScaledTensor(place(x[0], case.layout_x), place(x[1], "padded"), (1, 128))
    else:
        x = place(x, case.layout_x)
    ids, weights = _routed(case, seed)
    options: dict[str, Any] = {
        "activation": case.activation,
        "alpha": case.alpha,
        "beta": case.beta,
        "limit": case.limit,
        "quantize_activations": case.quantize,
        "apply_router_weight_on_input": case.on_input,
        "reduce": case.reduce,
        "shared": None,
        "expert_map": None,
    }
    if case.shared:
        own = replace(case, intermediate=case.shared_size or case.intermediate)
        options["shared"] = _experts(own, draw, case.shared)
    if case.mapped:
        options["expert_map"] = torch.full((2 * case.experts,), -1)
        options["expert_map"][1::2] = torch.arange(case.experts)
        elsewhere = torch.rand(ids.shape, generator=g) < 0.3
        ids = torch.where(ids < 0, -1, 2 * ids + torch.where(elsewhere, 0, 1))
    ids = ids.to(torch.int32 if case.index == "i32" else torch.int64)
    experts = _experts(case, draw, case.experts)
    return Operands(x, experts, place_indices(ids), place(draw.router(weights), "padded"), options)


def output(case: Experts) -> torch.Tensor:
    rows = case.tokens if case.reduce else case.tokens * case.top_k
    return place(torch.full((rows, case.hidden), torch.nan, dtype=case.out_dtype), case.layout_out)


def place_indices(ids: torch.Tensor) -> torch.Tensor:
    """A copy of ids amid indices that no table has."""
    rows, columns = ids.shape
    buffer = torch.full((rows + 2, columns + 3), 1 << 30, dtype=ids.dtype)
    view = buffer[1 : rows + 1, 1 : columns + 1]
    view.copy_(ids)
    return view


def _routed(case: Experts, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    skew = 1.2 if case.routing == "skewed" else 0.0
    ids, weights = routing(case.tokens, case.experts, case.top_k, skew, seed=seed)
    if case.routing == "one":  # every token on one expert, as often as it may choose
        ids = torch.full_like(ids, case.experts - 1)
    elif case.routing == "skips":
        ids = torch.where((ids + torch.arange(case.tokens).unsqueeze(1)) % 3 == 0, -1, ids)
    elif case.routing == "nothing":
        ids = torch.full_like(ids, -1)
    return ids, weights


# ---- values ------------------------------------------------------------------------------------------

Matrix = tuple[torch.Tensor, torch.Tensor]  # FP8 data, scale


class _Random:
    """Values as a case names them."""

    def __init__(self, case: Experts, g: torch.Generator) -> None:
        self.case, self.g, self.values = case, g, VALUES[case.values]

    def x(self) -> Any:
        shape = (self.case.tokens, self.case.hidden)
        if self.case.x in DTYPES:
            codes = fp8_data(self.g, shape, self.case.x, self.values)
            return codes, scale_grid(self.g, shape, (1, 128), "f32", self.values)
        return self.values.floats(self.g, shape).to(FLOATS[self.case.x])

    def router(self, weights: torch.Tensor) -> torch.Tensor:
        return weights

    def matrix(self, kinds: tuple[str, ...], rows: int, columns: int, block: tuple[int, int]) -> Matrix:
        """`rows` of each kind, one above the other; every other row if the case is interleaved."""
        shape = (len(kinds) * rows, columns)
        data = fp8_data(self.g, shape, self.case.weight, self.values)
        return data, scale_grid(self.g, shape, _whole(block, shape), self.case.scale, self.values)

    def bias(self, kinds: tuple[str, ...], elements: int) -> torch.Tensor:
        return torch.randn(len(kinds) * elements, generator=self.g)


class _Exact(_Random):
    """Small integers for which every step is exact in f32, so that all kernels must agree bit for bit.

    Gates come to 0 or 64 (times a power of two): e^-64 is lost beside 1, so that silu and gelu are 0 or the
    identity. Ups come to integers of at most 7, h to multiples of 64. For W8A8 each 128 columns of x and h have
    a largest value of 1.75 and 448 (times powers of two), so that their scales are powers of two and all codes
    exact: x has a 1.75 where they begin, which no weight uses, and a 1 in column 1; every 128th row of gate and
    up makes 64 and 7 of that. Sums over h stay below 2^24 of their unit.
    """

    def x(self) -> Any:
        x = torch.randint(0, 2, (self.case.tokens, self.case.hidden), generator=self.g).float()
        x[:, ::128] = 1.75
        x[:, 1] = 1
        if self.case.x in DTYPES:
            return round_to_fp8(x, self.case.x), torch.ones(self.case.tokens, -(-self.case.hidden // 128))
        return x.to(FLOATS[self.case.x])

    def router(self, weights: torch.Tensor) -> torch.Tensor:
        return torch.exp2(torch.randint(0, 3, weights.shape, generator=self.g).float())

    def matrix(self, kinds: tuple[str, ...], rows: int, columns: int, block: tuple[int, int]) -> Matrix:
        values = self._joined([self._values(kind, rows, columns) for kind in kinds])
        rows, columns = values.shape
        block = _whole(block, (rows, columns))
        exponent = torch.randint(-1, 2, (-(-rows // block[0]), -(-columns // block[1])), generator=self.g)
        scale = torch.exp2(exponent.float())
        spread = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
        data = round_to_fp8(values / spread, self.case.weight)
        return data, scale if self.case.scale == "f32" else (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)

    def bias(self, kinds: tuple[str, ...], elements: int) -> torch.Tensor:
        draws = [torch.randint(0, 2, (elements,), generator=self.g).float() for _ in kinds]
        return self._joined([draw * (64 if kind == "gate" else -2) for kind, draw in zip(kinds, draws, strict=True)])

    def _joined(self, parts: list[torch.Tensor]) -> torch.Tensor:
        if self.case.form == "interleaved":
            return torch.stack(parts, 1).flatten(0, 1)
        return torch.cat(parts)

    def _values(self, kind: str, rows: int, columns: int) -> torch.Tensor:
        if kind == "down":
            return torch.randint(-2, 3, (rows, columns), generator=self.g).float()
        values = torch.zeros(rows, columns)
        usable = torch.tensor([i for i in range(columns) if i % 128])
        for row in values:
            chosen = usable[torch.randperm(len(usable), generator=self.g)[: 1 if kind == "gate" else 7]]
            row[chosen] = (
                64.0 if kind == "gate" else torch.randint(0, 2, chosen.shape, generator=self.g).float() * 2 - 1
            )
        values[::128] = 0
        values[::128, 1] = 64 if kind == "gate" else 7
        return values


def exact(case: Experts) -> Experts | None:
    """The same problem on small integers, when its own values are ordinary ones and there is such a problem.

    A bias or a beta would move the largest h of a block from 448, and its scale from a power of two.
    """
    if case.values != "normal" or case.hidden < 2 or (case.w8a8 and (case.bias or case.beta)):
        return None
    return replace(case, values="integers", limit=case.limit and 64.0)


# ---- memory ------------------------------------------------------------------------------------------


def _experts(case: Experts, draw: _Random, count: int) -> ExpertWeights:
    size, hidden = case.intermediate, case.hidden
    biases: dict[str, Any] = {}
    if case.bias:
        b13 = torch.stack([draw.bias(("gate", "up"), size) for _ in range(count)]).to(FLOATS[case.bias])
        b2 = torch.stack([draw.bias(("down",), hidden) for _ in range(count)]).to(FLOATS[case.bias])
        stacked = place(b13, "padded"), place(b2, "padded")
        biases = dict(zip(("b13", "b2"), stacked if case.form != "list" else map(list, stacked), strict=True))

    def arranged(parts: list[tuple[str, ...]], rows: int, columns: int) -> Any:
        """Matrices of `parts`, one above the other with a grid each, for every expert."""
        block = _whole(case.block, (rows * len(parts[0]), columns))
        drawn = [[draw.matrix(kinds, rows, columns, block) for kinds in parts] for _ in range(count)]
        data = [place(_cat([data for data, _ in part]), case.layout_w) for part in drawn]
        scale = [place(_cat([scale for _, scale in part]), "padded") for part in drawn]
        if case.form in ("list", "separate"):
            return [ScaledTensor(d, s, block) for d, s in zip(data, scale, strict=True)]
        all_data = place(_cat(data), case.layout_w).unflatten(0, (count, -1))
        all_scales = place(_cat(scale), "padded").unflatten(0, (count, -1))
        return (all_data, all_scales) if len(parts) == 2 else ScaledTensor(all_data, all_scales, block)

    down = arranged([("down",)], hidden, size)
    if case.form.startswith("separate"):
        gate, up = arranged([("gate",)], size, hidden), arranged([("up",)], size, hidden)
        return ExpertWeights.separate(gate, up, down, **biases)
    split = case.form == "split"
    w13 = arranged([("gate",), ("up",)] if split else [("gate", "up")], size, hidden)
    return ExpertWeights(w13, down, interleaved=case.form == "interleaved", split_scales=split, **biases)


def _whole(block: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    return block[0] or shape[0], block[1] or shape[1]


def _cat(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.view(torch.uint8) if x.element_size() == 1 else x for x in parts]).view(parts[0].dtype)


# ---- the list ----------------------------------------------------------------------------------------


def _cases() -> Iterator[Experts]:
    # Numbers of tokens around blocks of activation rows; ragged sizes.
    for tokens in (1, 2, 7, 33, 140):
        yield Experts(tokens, 300, 200, 6, 2)
        yield Experts(tokens, 264, 130, 5, 3, quantize=True)
        yield Experts(tokens, 140, 97, 4, 2, x="e4m3fn", out="f32")
    # More rows of an expert than one task takes, and more tokens than a chunk has.
    for reduce in (True, False):
        yield Experts(600, 70, 40, 3, 2, routing="skewed", reduce=reduce)
        yield Experts(2100, 20, 12, 3, 2, routing="skips", reduce=reduce, quantize=True)
    yield Experts(2100, 20, 12, 2, 1, shared=1)
    for hidden, intermediate in ((1, 1), (3, 31), (31, 3), (129, 128), (128, 129), (256, 64), (576, 40)):
        for x in ("bf16", "e4m3fn"):
            yield Experts(5, hidden, intermediate, 3, 2, x=x, out="f32")
    # Few and many experts, all of them, one, none.
    for tokens, experts, top_k in ((9, 1, 1), (5, 4, 4), (3, 40, 8), (0, 3, 2), (6, 3, 0)):
        yield Experts(tokens, 140, 70, experts, top_k)
        yield Experts(tokens, 140, 70, experts, top_k, shared=1, quantize=True)
    for kind in ("skewed", "one", "skips", "nothing"):
        for shared in (0, 2):
            yield Experts(21, 150, 80, 6, 3, routing=kind, shared=shared)
        yield Experts(21, 150, 80, 6, 3, routing=kind, reduce=False, mapped=True)
        yield Experts(21, 150, 80, 6, 3, routing=kind, quantize=True, on_input=True, index="i32")
    for x in ("bf16", "e4m3fn"):
        for size in (31, 140):  # narrower and wider than the others
            yield Experts(21, 150, 80, 6, 3, x=x, shared=2, shared_size=size, on_input=True)
            yield Experts(2, 150, 80, 6, 3, x=x, shared=1, shared_size=size, bias="f32", out="f32")
    # Formats.
    for weight in DTYPES:
        for x in (*FLOATS, *DTYPES):
            yield Experts(7, 200, 96, 4, 2, x=x, weight=weight, out="f32")
    for out in FLOATS:
        for x in ("f32", "f16", "bf16"):
            yield Experts(7, 200, 96, 4, 2, x=x, out=out)
            yield Experts(7, 200, 96, 4, 2, x=x, out=out, quantize=True)
    # Forms of the weights; I = 72 and 192 fill no whole number of blocks, and 192 is four rows of them, not three.
    for form in FORMS:
        for intermediate in (72, 192):
            yield Experts(9, 150, intermediate, 4, 2, form=form)
            yield Experts(9, 150, intermediate, 4, 2, form=form, quantize=True, scale="ue8m0", shared=1)
        yield Experts(9, 150, 72, 4, 2, form=form, bias="f32", x="f32")
        yield Experts(9, 150, 72, 4, 2, form=form, bias="bf16", quantize=True)
        for block in ((1, 0), (0, 0), (1, 128)):
            yield Experts(9, 280, 72, 4, 2, form=form, block=block, out="f32")
        if form != "split":  # whose blocks are inferred
            for block in ((32, 128), (128, 256)):
                yield Experts(9, 280, 72, 4, 2, form=form, block=block, out="f32")
    # Activations.
    for x in ("bf16", "f32", "e4m3fn"):
        yield Experts(9, 150, 80, 4, 2, x=x, alpha=1.702, beta=1.0, limit=1.5, bias="f32", form="interleaved")
        yield Experts(9, 150, 80, 4, 2, x=x, limit=0.7)
        yield Experts(9, 150, 80, 4, 2, x=x, alpha=-2.5, out="f32")
        for activation in ("gelu", "gelu_tanh"):
            yield Experts(9, 150, 80, 4, 2, x=x, activation=activation, out="f32")
            yield Experts(9, 150, 80, 4, 2, x=x, activation=activation, limit=0.9, bias="f16")
    # Where the router's weights go.
    for x in ("bf16", "e4m3fn"):
        for on_input in (False, True):
            for reduce in (False, True):
                yield Experts(9, 150, 80, 4, 3, x=x, on_input=on_input, reduce=reduce, bias="f32")
                yield Experts(9, 150, 80, 4, 3, x=x, on_input=on_input, reduce=reduce, mapped=True)
    # Memory.
    for layout in ("padded", "columns", "every_other", "expanded"):
        yield Experts(9, 150, 80, 4, 2, layout_x=layout)
        yield Experts(9, 150, 80, 4, 2, layout_x=layout, x="e4m3fn")
        yield Experts(9, 150, 80, 4, 2, layout_w=layout if layout != "expanded" else "rows", quantize=True)
        if layout != "expanded":
            yield Experts(9, 150, 80, 4, 2, layout_out=layout, shared=1)
            yield Experts(9, 150, 80, 4, 2, layout_out=layout, reduce=False)
    # Values.
    for values in ("outliers", "codes", "rows apart", "zeros", "tiny scales"):
        for x in ("f32", "e4m3fn"):
            yield Experts(9, 150, 80, 4, 2, x=x, values=values, out="f32")


EXPERTS = tuple(_cases())
