"""The problems of moe_gate, moe_permute and moe_unpermute, as data, and the operands that a problem stands for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch

from moekern.ops import Permuted, Routing, permuted_rows
from moekern.ops.quantize import reference_cast
from moekern.scaled import BLOCK, DTYPES, ScaledTensor
from moekern.testing.cases import FLOATS, VALUES, fp8_data, place, scale_grid
from moekern.testing.expert_cases import place_indices
from moekern.testing.moe_models import routing

INDICES = {"i32": torch.int32, "i64": torch.int64}


def _name(case: object, head: str, first: int) -> str:
    """`head`, and every field from the `first` on that differs from its default."""
    changed = (f for f in fields(case)[first:] if getattr(case, f.name) != f.default)  # type: ignore[arg-type]
    return "-".join([head, *(f"{f.name}={getattr(case, f.name)}".replace(" ", "") for f in changed)])


@dataclass(frozen=True)
class Gate:
    """One call of moe_gate: `topk` of `experts`, of which `kept` of `groups` groups take part."""

    tokens: int
    experts: int
    topk: int
    logits: str = "f32"
    scoring: str = "softmax"
    bias: str | None = None  # a dtype
    groups: int = 1
    kept: int = 1
    renormalize: bool = False
    factor: float = 1.0
    mask: float = -math.inf
    layout: str = "rows"
    layout_out: str = "rows"
    values: str = "normal"

    def __str__(self) -> str:
        return _name(self, f"{self.tokens}x{self.experts}-top{self.topk}", 3)

    @property
    def exact(self) -> bool:
        """Whether selection values are exact in float32, so that ids have to be those of the reference."""
        return self.values in ("ties", "nan bias", "infinite bias")


@dataclass(frozen=True)
class Permute:
    """One call of moe_permute: x [tokens, hidden], topk of `experts`."""

    tokens: int
    hidden: int
    experts: int
    topk: int
    x: str = "bf16"  # a float dtype or an FP8 format
    alignment: int = 1
    routing: str = "even"
    mapped: bool = False  # ids are of twice as many experts, of which every other lives here
    index: str = "i32"
    block: int = 128  # columns of one scale; 0 is the whole row
    scale: str = "f32"  # or "ue8m0"
    layout: str = "rows"
    layout_scale: str = "rows"
    layout_out: str = "rows"
    spare: int = 0  # rows of out beyond those that suffice
    format: str | None = None  # of FP8, that a float x is cast to
    round_scale_up: bool = False
    values: str = "normal"  # of a float x

    def __str__(self) -> str:
        return _name(self, f"{self.tokens}x{self.hidden}-{self.topk}of{self.experts}", 4)


@dataclass(frozen=True)
class Unpermute:
    """One call of moe_unpermute: topk of the `rows` rows of y [rows, hidden] for each token."""

    tokens: int
    hidden: int
    topk: int
    rows: int
    y: str = "bf16"
    weights: str | None = "f32"
    out: str | None = None
    index: str = "i32"
    skips: str = "none"  # "some", "all", or "nan": some, with weights of NaN
    layout: str = "rows"
    layout_out: str = "rows"
    values: str = "normal"

    def __str__(self) -> str:
        return _name(self, f"{self.tokens}x{self.hidden}-{self.topk}of{self.rows}", 4)


# ---- operands ----------------------------------------------------------------------------------------


def gate_operands(case: Gate, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments of one call, `out` left out."""
    g = torch.Generator().manual_seed(seed)
    shape = (case.tokens, case.experts)
    logits, bias = torch.randn(shape, generator=g), torch.randn(1, case.experts, generator=g) * 0.2
    if case.values == "ties":  # scores of 1/2 each, and sums of multiples of 1/8
        logits, bias = torch.zeros(shape), torch.randint(-12, 13, bias.shape, generator=g) / 8
    elif case.values == "few":
        logits, bias = torch.randint(-1, 2, shape, generator=g).float(), torch.zeros(bias.shape)
    elif case.values == "equal":
        logits, bias = torch.full(shape, 0.3), torch.zeros(bias.shape)
    elif case.values == "wide":  # scores from 0 to 1, and exponents beyond float32's
        logits = logits * 60
    elif case.values == "negative":  # no group's selection values reach a mask of 0
        bias = bias - 2
    elif case.values in ("nan", "infinite"):
        special = [torch.nan] if case.values == "nan" else [torch.inf, -torch.inf]
        hit = torch.rand(shape, generator=g) < 0.05
        logits = torch.where(hit, torch.tensor(special)[torch.randint(len(special), shape, generator=g)], logits)
    elif case.values == "all nan":
        logits = torch.full(shape, torch.nan)
    elif case.values in ("nan bias", "infinite bias"):  # -infinity switches an expert off
        logits, bias = torch.zeros(shape), torch.randint(-12, 13, bias.shape, generator=g) / 8
        bias[:, ::3] = torch.nan if case.values == "nan bias" else -torch.inf
    bias_layout = "aligned" if case.layout == "aligned" else "padded"
    options = {
        "scoring": case.scoring,
        "correction_bias": place(bias.to(FLOATS[case.bias]), bias_layout)[0] if case.bias else None,
        "num_expert_group": case.groups,
        "topk_group": case.kept,
        "renormalize": case.renormalize,
        "routed_scaling_factor": case.factor,
        "mask_value": case.mask,
    }
    return (place(logits.to(FLOATS[case.logits]), case.layout), case.topk), options


def _indices_out(rows: int, columns: int, layout: str) -> torch.Tensor:
    """int32 amid NaN: `only_written` takes its view as float32."""
    return place(torch.full((rows, columns), torch.nan), layout).view(torch.int32)


def gate_output(case: Gate) -> Routing:
    shape = (case.tokens, case.topk)
    return Routing(place(torch.full(shape, torch.nan), case.layout_out), _indices_out(*shape, case.layout_out))


def _routed(case: Permute, seed: int) -> torch.Tensor:
    ids, _ = routing(case.tokens, case.experts, case.topk, 1.2 if case.routing == "skewed" else 0.0, seed=seed)
    if case.routing == "one":  # every slot on one expert
        ids = torch.full_like(ids, case.experts - 1)
    elif case.routing == "skips":
        ids = torch.where((ids + torch.arange(case.tokens).unsqueeze(1)) % 3 == 0, -1, ids)
    elif case.routing == "nothing":
        ids = torch.full_like(ids, -1)
    return ids


def permute_operands(case: Permute, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    shape = (case.tokens, case.hidden)
    if case.x in DTYPES:
        block = (1, case.block or max(case.hidden, 1))
        scale = scale_grid(g, shape, block, case.scale, VALUES["normal"])
        data = fp8_data(g, shape, case.x, VALUES["all codes"])
        x: Any = ScaledTensor(place(data, case.layout), place(scale, case.layout_scale), block)
    else:
        x = place(VALUES[case.values].floats(g, shape).to(FLOATS[case.x]), case.layout)
    ids, expert_map = _routed(case, seed), None
    if case.mapped:
        expert_map = torch.full((2 * case.experts,), -1)
        expert_map[1::2] = torch.arange(case.experts)
        elsewhere = torch.rand(ids.shape, generator=g) < 0.3
        ids = torch.where(ids < 0, -1, 2 * ids + torch.where(elsewhere, 0, 1))
        expert_map = place_indices(expert_map.to(INDICES[case.index]).unsqueeze(0))[0]
    ids = place_indices(ids.to(INDICES[case.index]))
    options: dict[str, Any] = {"alignment": case.alignment, "expert_map": expert_map}
    if case.format:
        options |= {"format": case.format, "round_scale_up": case.round_scale_up}
    return (x, ids, case.experts), options


def marked(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Of bytes that no operand here holds much of: rows that a kernel has to leave alone."""
    return torch.full((rows * columns * dtype.itemsize,), 0xA5, dtype=torch.uint8).view(dtype).view(rows, columns)


def permute_output(case: Permute, x: torch.Tensor | ScaledTensor) -> Permuted:
    rows = permuted_rows(case.tokens, case.topk, case.experts, case.alignment) + case.spare
    if case.format and isinstance(x, torch.Tensor):
        x = reference_cast(x, (1, BLOCK), case.format, round_scale_up=False)
    if isinstance(x, ScaledTensor):
        data = place(marked(rows, case.hidden, x.data.dtype), case.layout_out)
        scale = place(marked(rows, x.scale.shape[1], x.scale.dtype), case.layout_scale)
        moved: Any = ScaledTensor(data, scale, x.block)
    else:
        moved = place(marked(rows, case.hidden, x.dtype), case.layout_out)
    return Permuted(moved, None, _indices_out(case.tokens, case.topk, case.layout_out))


def unpermute_operands(case: Unpermute, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    g = torch.Generator().manual_seed(seed)
    values = VALUES[case.values]
    y = place(values.floats(g, (case.rows, case.hidden)).to(FLOATS[case.y]), case.layout)
    shape = (case.tokens, case.topk)
    inverse = torch.randint(0, max(case.rows, 1), shape, generator=g)
    if case.skips != "none":
        skipped = torch.rand(shape, generator=g) < (2.0 if case.skips == "all" else 0.4)
        inverse = torch.where(skipped, -1, inverse)
    weights = None
    if case.weights:
        weights = torch.randint(-2, 3, shape, generator=g) / 2 if not values.rounds else torch.rand(shape, generator=g)
        if case.skips == "nan":
            weights = torch.where(inverse < 0, torch.nan, weights)
        weights = place(weights.to(FLOATS[case.weights]), "padded")
    return y, place_indices(inverse.to(INDICES[case.index])), weights


def unpermute_output(case: Unpermute) -> torch.Tensor:
    dtype = FLOATS[case.out or case.y]
    return place(torch.full((case.tokens, case.hidden), torch.nan, dtype=dtype), case.layout_out)


# ---- the lists ---------------------------------------------------------------------------------------


def _gate() -> Iterator[Gate]:
    # Numbers of experts around vectors and blocks of 16, and of models: 8, 64, 128, 160, 256, 384.
    for experts in (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 60, 64, 128, 160, 256, 257, 384, 513, 1023, 1024):
        for scoring in ("softmax", "sigmoid"):
            yield Gate(5, experts, min(experts, 8), scoring=scoring)
            yield Gate(7, experts, min(experts, 32), scoring=scoring, bias="f32", renormalize=True, factor=2.5)
    for tokens in (0, 1, 2, 3, 4, 6, 31, 32, 33, 37, 130):
        yield Gate(tokens, 40, 5, bias="bf16")
    for topk in (1, 2, 3, 16, 20, 31, 32):
        yield Gate(9, 64, topk, renormalize=True)
        yield Gate(9, 32, topk, scoring="sigmoid")
    # Groups: DeepSeek-V2's and V3's, and sizes that are no multiple of a block.
    for bias in (None, "f32"):
        for mask in (-math.inf, 0.0):
            for experts, groups, kept, topk in (
                (256, 8, 4, 8),
                (160, 8, 3, 6),
                (384, 1, 1, 8),
                (60, 6, 2, 7),
                (66, 3, 3, 6),
                (100, 50, 10, 9),
                (1024, 512, 30, 32),
                (34, 2, 1, 17),
            ):
                for values in ("normal", "ties", "few", "negative"):
                    yield Gate(
                        9, experts, topk, scoring="sigmoid", bias=bias, groups=groups, kept=kept, mask=mask,
                        values=values, renormalize=True,
                    )  # fmt: skip
                yield Gate(9, experts, topk, bias=bias, groups=groups, kept=kept, mask=mask)
    yield Gate(5, 40, 5, groups=40, kept=7)  # one expert a group
    yield Gate(5, 40, 5, groups=40, kept=3, mask=0.0)  # fewer experts in the groups than are taken
    for logits in FLOATS:
        for bias in (None, *FLOATS):
            yield Gate(17, 96, 6, logits=logits, scoring="sigmoid", bias=bias)
            yield Gate(17, 96, 6, logits=logits, bias=bias, groups=4, kept=2)
    for layout in ("padded", "columns", "every_other", "expanded"):
        yield Gate(11, 70, 6, logits="bf16", layout=layout, bias="f32")
        if layout != "expanded":
            yield Gate(11, 70, 6, layout_out=layout, renormalize=True)
    for experts in (2, 4, 8, 60, 64, 128, 160, 256, 384, 512, 1024):
        for logits in FLOATS:
            yield Gate(6, experts, min(experts, 6), logits=logits, bias=logits, layout="aligned")
    for scoring in ("softmax", "sigmoid"):
        for experts, groups, kept in ((70, 1, 1), (256, 8, 4)):
            for bias in (None, "f32"):
                for values in ("ties", "few", "equal", "wide", "nan", "infinite", "all nan"):
                    yield Gate(
                        13, experts, 8, scoring=scoring, bias=bias, groups=groups, kept=kept, values=values,
                        renormalize=True,
                    )  # fmt: skip
            for values in ("nan bias", "infinite bias"):
                yield Gate(13, experts, 8, scoring="sigmoid", bias="f32", groups=groups, kept=kept, values=values)
    yield Gate(3, 8, 8, scoring="sigmoid", bias="f32", values="infinite bias")  # those switched off come last


# tokens, hidden, experts, topk: none of something, or one token.
_SMALLEST = ((0, 64, 4, 2), (1, 1, 1, 1), (1, 7168, 256, 8), (5, 0, 4, 2), (5, 64, 4, 0))


def _permute() -> Iterator[Permute]:
    for tokens, hidden, experts, topk in (
        *_SMALLEST,
        (37, 33, 3, 3),
        (64, 129, 160, 6),
        (9, 70, 513, 32),
        (130, 40, 8, 2),
    ):
        for alignment in (1, 4, 128):
            yield Permute(tokens, hidden, experts, topk, alignment=alignment)
    yield Permute(5, 64, 0, 0)
    for hidden in range(1, 70, 4):  # heads and tails of vectors, at every alignment of rows
        yield Permute(6, hidden, 4, 2, x="f16")
    for x in (*FLOATS, *DTYPES):
        for index in INDICES:
            for alignment in (1, 8):
                yield Permute(21, 300, 7, 3, x=x, index=index, alignment=alignment, mapped=index == "i64")
    for routing_ in ("skewed", "one", "skips", "nothing"):
        for mapped in (False, True):
            yield Permute(33, 65, 6, 4, routing=routing_, alignment=4, mapped=mapped)
            yield Permute(33, 65, 6, 4, routing=routing_, mapped=mapped, x="e4m3fn")
    for scale in ("f32", "ue8m0"):
        for block in (128, 0, 32, 1):
            yield Permute(9, 300, 5, 2, x="e5m2", scale=scale, block=block, alignment=4)
    for layout in ("padded", "columns", "every_other", "expanded"):
        yield Permute(12, 45, 5, 2, layout=layout, alignment=4)
        yield Permute(12, 45, 5, 2, x="e4m3fn", layout=layout)
        if layout != "expanded":
            yield Permute(12, 45, 5, 2, x="e4m3fn", block=4, layout_scale=layout, alignment=4)
    yield Permute(12, 45, 5, 2, layout_out="padded", alignment=4, spare=3)
    yield Permute(12, 45, 5, 2, x="e4m3fn", layout_out="padded", spare=3, routing="skips")
    for x in (*FLOATS, *DTYPES):
        yield Permute(
            13, 544, 5, 3, x=x, layout="aligned", layout_out="aligned", layout_scale="aligned", alignment=4, block=32
        )
    for hidden in (4, 8, 12, 16, 24, 64, 68, 1000):  # rows of so many bytes, in the widest pieces that they divide into
        yield Permute(5, hidden, 4, 2, x="e4m3fn", layout="aligned", layout_out="aligned", alignment=4)
    yield Permute(9, 9000, 4, 2, layout="aligned", layout_out="aligned", alignment=4)
    yield Permute(1100, 8, 1500, 5, routing="skips")  # more experts than are counted at once
    yield Permute(3000, 4, 33, 7, routing="skewed", alignment=2)
    yield Permute(300, 9000, 16, 2, x="f32", alignment=16)  # past the caches
    yield from _permute_cast()


def _permute_cast() -> Iterator[Permute]:
    for tokens, hidden, experts, topk in (
        *_SMALLEST,
        (37, 129, 3, 3),
        (9, 70, 513, 32),
    ):
        for alignment in (1, 16):
            yield Permute(tokens, hidden, experts, topk, format="e4m3fn", alignment=alignment)
    for x in FLOATS:
        for format in DTYPES:
            for layout in ("rows", "aligned"):
                yield Permute(
                    21, 304, 7, 3, x=x, format=format, round_scale_up=format == "e5m2", mapped=x == "f16", alignment=8,
                    layout=layout, layout_out=layout, layout_scale="padded",
                )  # fmt: skip
    for routing_ in ("skewed", "one", "skips", "nothing"):
        yield Permute(33, 200, 6, 4, routing=routing_, format="e4m3fn", alignment=4, index="i64", mapped=True)
        yield Permute(33, 200, 6, 4, routing=routing_, format="e4m3fnuz", layout_scale="columns", spare=3)
    for layout in ("padded", "columns", "every_other", "expanded"):
        yield Permute(12, 300, 5, 2, format="e4m3fn", layout=layout, layout_out="padded", alignment=4)
    for values in ("nan and inf", "huge", "zeros", "signed zeros", "below smallest amax"):
        for format in DTYPES:
            yield Permute(9, 300, 5, 2, x="f32", format=format, values=values)
        yield Permute(
            9, 304, 5, 2, format="e4m3fn", round_scale_up=True, values=values, layout="aligned", layout_out="aligned"
        )
    yield Permute(5, 4500, 4, 2, format="e4m3fn", values="outliers")  # wider than what is cast at a time
    yield Permute(600, 9000, 16, 2, format="e5m2", alignment=16)  # past the caches


def _unpermute() -> Iterator[Unpermute]:
    for tokens, hidden, topk, rows in ((0, 64, 2, 5), (3, 0, 2, 5), (3, 64, 0, 5), (1, 7168, 8, 8), (40, 129, 3, 9)):
        yield Unpermute(tokens, hidden, topk, rows)
    yield Unpermute(3, 64, 2, 0, skips="all")
    for hidden in (1, 3, 8, 15, 17, 31, 33, 63, 64, 65, 127, 257):
        yield Unpermute(4, hidden, 3, 20, y="f32")
    for topk in (1, 2, 5, 31, 32, 64):
        yield Unpermute(9, 70, topk, 50)
    for y in FLOATS:
        for out in (None, *FLOATS):
            for weights in (None, *FLOATS):
                yield Unpermute(9, 141, 4, 40, y=y, out=out, weights=weights)
    for skips in ("some", "all", "nan"):
        for index in INDICES:
            yield Unpermute(23, 70, 4, 40, index=index, skips=skips)
    for layout in ("padded", "columns", "every_other", "expanded"):
        yield Unpermute(9, 70, 4, 40, y="f32", layout=layout)
    for y in FLOATS:
        for out in FLOATS:
            for hidden in (8, 264):
                yield Unpermute(9, hidden, 3, 40, y=y, out=out, skips="some", layout="aligned", layout_out="aligned")
    for topk in (1, 7, 8, 9, 16, 33):
        yield Unpermute(5, 64, topk, 50, skips="some", layout="aligned", layout_out="aligned")
    yield Unpermute(3, 7168, 8, 20, layout="aligned", layout_out="aligned")
    yield Unpermute(9, 70, 4, 40, layout_out="padded")
    for values in ("integers", "rows apart", "tiny", "huge", "zeros", "nan", "nan and inf", "signed zeros"):
        yield Unpermute(9, 141, 4, 40, y="f32", values=values, skips="some")
        yield Unpermute(9, 141, 1, 40, y="f32", weights=None, values=values)
    yield Unpermute(9, 70, 4, 40, y="f32", out="f16", values="huge")  # infinities where the reference says so


GATE = tuple(_gate())
PERMUTE = tuple(_permute())
UNPERMUTE = tuple(_unpermute())
