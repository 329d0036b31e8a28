"""The problems that every kernel runs, as data, and the operands that a problem stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from moekern.ops.quantize import round_to_fp8
from moekern.scaled import DTYPES, MAX, ScaledTensor

FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_POISON = {"e4m3fn": 0x7F, "e5m2": 0x7F, "e4m3fnuz": 0x80, "ue8m0": 0xFF}  # a NaN of each format
_GUARD = 67  # elements of poison on either side; odd, so that operands are as badly aligned as can be
_ALIGNED = 32  # elements


@dataclass(frozen=True)
class Gemm:
    """One call of fp8_gemm_nt: d [m, n] = c + bias + a [m, k] b [n, k]^T."""

    m: int
    n: int
    k: int
    a: str = "bf16"
    b: str = "e4m3fn"
    out: str | None = None  # a dtype; None leaves it to the op
    bias: str | None = None
    c: str | None = None  # a dtype, or "out" to accumulate in place
    block_a: tuple[int, int] = (1, 128)  # 0 is the whole extent
    block_b: tuple[int, int] = (128, 128)
    scale: str = "f32"  # or "ue8m0"
    layout_a: str = "rows"
    layout_b: str = "rows"
    layout_scale: str = "rows"
    layout_out: str = "rows"
    values: str = "normal"

    def __str__(self) -> str:
        return _name(self, f"{self.m}x{self.n}x{self.k}-{self.a}-{self.b}")


@dataclass(frozen=True)
class Cast:
    """One call of a cast to FP8. `rows` x `cols` is the shape of the result."""

    op: str
    rows: int
    cols: int
    x: str = "bf16"
    format: str = "e4m3fn"
    round_scale_up: bool = False
    layout: str = "rows"
    layout_out: str = "padded"
    values: str = "normal"

    def __str__(self) -> str:
        return _name(self, f"{self.op.split('_cast')[0]}-{self.rows}x{self.cols}-{self.x}-{self.format}")


@dataclass(frozen=True)
class Dequantize:
    rows: int
    cols: int
    format: str = "e4m3fn"
    block: tuple[int, int] = (128, 128)
    scale: str = "f32"
    out: str = "f32"
    layout: str = "rows"
    layout_out: str = "padded"
    values: str = "codes"

    def __str__(self) -> str:
        return _name(self, f"{self.rows}x{self.cols}-{self.format}-{self.out}")


def _name(case: object, head: str) -> str:
    """`head`, and every later field that differs from its default."""
    fields = type(case).__dataclass_fields__  # type: ignore[attr-defined]
    shown = {"op", "m", "n", "k", "a", "b", "rows", "cols", "x", "format"} | (
        {"out"} if isinstance(case, Dequantize) else set()
    )
    tail = [
        f"{name}={value}".replace(" ", "")
        for name, field in fields.items()
        if name not in shown and (value := getattr(case, name)) != field.default
    ]
    return "-".join([head, *tail])


# ---- memory ------------------------------------------------------------------------------------------


def place(x: torch.Tensor, layout: str = "rows") -> torch.Tensor:
    """A copy of x [rows, columns] inside a larger buffer whose other elements are all NaN.

    rows: one row after another. padded: poison between rows. columns: one column after another.
    every_other: poison between elements. expanded: the first row, for all rows (stride 0).
    aligned: as padded, with rows that begin at multiples of 32 elements, as most do that are not views.
    """
    rows, cols = x.shape
    guard = _GUARD if layout != "aligned" else 2 * _ALIGNED
    strides = {
        "rows": (cols, 1),
        "padded": (cols + 13, 1),
        "columns": (1, rows + 5),
        "every_other": (2 * cols + 3, 2),
        "expanded": (0, 1),
        "aligned": ((cols + 2 * _ALIGNED - 1) // _ALIGNED * _ALIGNED, 1),
    }[layout]
    span = rows * strides[0] + cols * strides[1] + 1
    buffer = poisoned(2 * guard + span, x.dtype)
    view = buffer.as_strided((rows, cols), strides, guard)
    if layout == "expanded":
        view[:1].view(storable(x.dtype)).copy_(x[:1].view(storable(x.dtype)))
    else:
        view.view(storable(x.dtype)).copy_(x.view(storable(x.dtype)))
    return view


def only_written(view: torch.Tensor) -> bool:
    """Whether everything around a view that `place` made is still poison."""
    size = view.untyped_storage().nbytes() // view.element_size()
    whole = view.as_strided((size,), (1,), 0).view(storable(view.dtype)).clone()
    poison = poisoned(size, view.dtype)
    whole.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(
        poison.as_strided(view.shape, view.stride(), view.storage_offset()).view(whole.dtype)
    )
    return torch.equal(whole.view(torch.uint8), poison.view(torch.uint8))


def storable(dtype: torch.dtype) -> torch.dtype:
    return torch.uint8 if dtype.itemsize == 1 else dtype


def poisoned(count: int, dtype: torch.dtype) -> torch.Tensor:
    if dtype.itemsize > 1:
        return torch.full((count,), torch.nan, dtype=dtype)
    name = "ue8m0" if dtype == torch.float8_e8m0fnu else next(f for f, d in DTYPES.items() if d == dtype)
    return torch.full((count,), _POISON[name], dtype=torch.uint8).view(dtype)


# ---- values ------------------------------------------------------------------------------------------

Fill = Callable[[torch.Generator, tuple[int, int]], torch.Tensor]  # (generator, shape) -> float32


def _integers(g: torch.Generator, shape: tuple[int, int]) -> torch.Tensor:
    return torch.randint(-2, 3, shape, generator=g).float()


def _normal(g: torch.Generator, shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=g)


def _times(fill: Fill, factor: float) -> Fill:
    return lambda g, shape: fill(g, shape) * factor


def _rows_apart(g: torch.Generator, shape: tuple[int, int]) -> torch.Tensor:
    """Neighbouring rows differ by 1e30."""
    return _normal(g, shape) * torch.tensor([1e-15, 1e15])[torch.arange(shape[0]) % 2].unsqueeze(1)


def _columns_apart(g: torch.Generator, shape: tuple[int, int]) -> torch.Tensor:
    """Outlier channels, as activations of real models have them."""
    return _normal(g, shape) * torch.where(torch.rand(shape[1], generator=g) < 0.02, 1e4, 1.0)


def _sprinkle(*special: float) -> Fill:
    """Normal values, one in a hundred replaced by a special one, and at least one of them."""

    def fill(g: torch.Generator, shape: tuple[int, int]) -> torch.Tensor:
        x = _normal(g, shape)
        hit = torch.rand(shape, generator=g) < 0.01
        if hit.numel():
            hit.view(-1)[-1] = True  # the very last element: a tail of every loop
        choice = torch.randint(len(special), shape, generator=g)
        return torch.where(hit, torch.tensor(special)[choice], x)

    return fill


def _scales(g: torch.Generator, shape: tuple[int, int]) -> torch.Tensor:
    return torch.rand(shape, generator=g) * 0.03 + 0.001


def _powers(low: int, high: int) -> Fill:
    return lambda g, shape: torch.exp2(torch.randint(low, high + 1, shape, generator=g).float())


def _either(*values: float) -> Fill:
    return lambda g, shape: torch.tensor(values)[torch.randint(len(values), shape, generator=g)]


@dataclass(frozen=True)
class Values:
    """How the float operand, the FP8 data (None: a random one of all its codes) and the scales are drawn."""

    floats: Fill = _normal
    data: Fill | None = _times(_normal, 8.0)
    scales: Fill = _scales
    special: bool = False  # NaN and infinity among the codes
    rounds: bool = True  # False: every sum is exact in f32, so all kernels must agree bit for bit


VALUES = {
    # |a|, |b| <= 2 and scales in 2^-2 .. 2^2: products are multiples of 2^-4 below 2^6, so that sums
    # of up to 2^14 of them stay below 2^24 units: exact in f32, in whatever order.
    "integers": Values(_integers, _integers, _powers(-2, 2), rounds=False),
    "normal": Values(),
    "outliers": Values(_columns_apart),
    "codes": Values(data=None),  # +-max, subnormals, -0
    "all codes": Values(data=None, special=True),
    "rows apart": Values(_rows_apart),
    "tiny": Values(_times(_normal, 1e-38)),
    "huge": Values(_times(_normal, 1e38)),
    "zeros": Values(lambda g, shape: torch.zeros(shape), lambda g, shape: torch.zeros(shape)),
    "tiny scales": Values(scales=_times(_scales, 1e-30)),
    "huge scales": Values(scales=_times(_scales, 1e30)),
    "scales apart": Values(scales=_either(1e-30, 1.0, 1e30)),
    "nan": Values(_sprinkle(torch.nan)),
    "nan and inf": Values(_sprinkle(torch.nan, torch.inf, -torch.inf)),
    "nan scales": Values(scales=_either(0.01, 0.02, 0.03, torch.nan)),
    "signed zeros": Values(_sprinkle(-0.0, 0.0, 1e-45, -1e-45)),
    "below smallest amax": Values(_times(_normal, 1e-6)),
}


def fp8_data(g: torch.Generator, shape: tuple[int, int], format: str, values: Values) -> torch.Tensor:
    if values.data is not None:
        return round_to_fp8(values.data(g, shape), format)
    codes = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    data = codes.view(DTYPES[format])
    if values.special:
        return data
    return torch.where(data.float().isfinite(), codes, codes & 0x78).view(DTYPES[format])


def scale_grid(
    g: torch.Generator, shape: tuple[int, int], block: tuple[int, int], dtype: str, values: Values
) -> torch.Tensor:
    grid = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    scale = values.scales(g, grid)
    if dtype == "f32":
        return scale
    code = torch.where(scale.isnan(), 255, torch.frexp(scale)[1] + 126)  # 2^floor(log2 s)
    return code.clamp(0, 255).to(torch.uint8).view(torch.float8_e8m0fnu)


def whole_block(block: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    return (block[0] or max(shape[0], 1), block[1] or max(shape[1], 1))


def _scaled(
    g: torch.Generator,
    shape: tuple[int, int],
    format: str,
    block: tuple[int, int],
    scale: str,
    values: Values,
    layout: str,
    layout_scale: str,
) -> ScaledTensor:
    block = whole_block(block, shape)
    grid = scale_grid(g, shape, block, scale, values)
    return ScaledTensor(place(fp8_data(g, shape, format, values), layout), place(grid, layout_scale), block)


@dataclass(frozen=True)
class GemmOperands:
    a: torch.Tensor | ScaledTensor
    b: ScaledTensor
    c: torch.Tensor | None
    bias: torch.Tensor | None


def gemm_operands(case: Gemm, seed: int = 0) -> GemmOperands:
    """The operands of a case. c is separate from any output: see `gemm_output`."""
    g = torch.Generator().manual_seed(seed)
    values = VALUES[case.values]
    shape_a, shape_b, shape_d = (case.m, case.k), (case.n, case.k), (case.m, case.n)
    if case.a in DTYPES:
        a: torch.Tensor | ScaledTensor = _scaled(
            g, shape_a, case.a, case.block_a, case.scale, values, case.layout_a, case.layout_scale
        )
    else:
        a = place(values.floats(g, shape_a).to(FLOATS[case.a]), case.layout_a)
    b = _scaled(g, shape_b, case.b, case.block_b, case.scale, values, case.layout_b, case.layout_scale)
    addend = _integers if not values.rounds else _normal
    c = bias = None
    if case.c:
        dtype = FLOATS[case.c] if case.c in FLOATS else gemm_out_dtype(case)
        c = place(addend(g, shape_d).to(dtype), case.layout_out)
    if case.bias:
        bias = place(addend(g, (1, case.n)).to(FLOATS[case.bias]), "padded")[0]
    return GemmOperands(a, b, c, bias)


def gemm_out_dtype(case: Gemm) -> torch.dtype:
    return FLOATS[case.out or (case.a if case.a in FLOATS else "bf16")]


def gemm_output(case: Gemm, operands: GemmOperands) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(c, out) for one call: out is poison, or c's values when the case accumulates in place."""
    if case.c == "out":
        assert operands.c is not None
        out = place(operands.c, case.layout_out)
        return out, out
    nothing = torch.full((case.m, case.n), torch.nan, dtype=gemm_out_dtype(case))
    return operands.c, place(nothing, case.layout_out)


def cast_input(case: Cast, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    cols = case.cols * (2 if case.op.startswith("silu_mul") else 1)
    return place(VALUES[case.values].floats(g, (case.rows, cols)).to(FLOATS[case.x]), case.layout)


def dequantize_input(case: Dequantize, seed: int = 0) -> ScaledTensor:
    g = torch.Generator().manual_seed(seed)
    shape = (case.rows, case.cols)
    return _scaled(g, shape, case.format, case.block, case.scale, VALUES[case.values], case.layout, "padded")


# ---- the lists ---------------------------------------------------------------------------------------


def _gemm() -> Iterator[Gemm]:
    # Every number of rows around the tiles of every kernel, in both kinds of activations.
    for m in (*range(1, 18), 24, 33, 48, 65, 130, 300):
        yield Gemm(m, 129, 264)
    for m in (1, 2, 5, 8, 9, 16, 17, 33, 130):
        yield Gemm(m, 97, 300, a="e4m3fn")
    # Edges of n and k: around vectors, strips, tasks and scale blocks. 576 is DeepSeek-V3's kv_a_proj
    # and SmolLM2's hidden size: four and a half blocks.
    for n, k in (
        (1, 1),
        (3, 31),
        (31, 3),
        (33, 127),
        (127, 129),
        (129, 128),
        (128, 33),
        (2, 300),
        (520, 17),
        (64, 256),
    ):
        for m in (1, 3, 19):
            yield Gemm(m, n, k)
        yield Gemm(2, n, k, a="e4m3fn", out="f32")
    for m in (1, 4, 40):
        yield Gemm(m, 576, 520)
        yield Gemm(m, 520, 576, a="e4m3fn")
    yield Gemm(1, 40, 4500)  # longer than what one pass keeps in L1
    yield Gemm(7, 40, 4500, a="e4m3fn")
    # Formats and output types.
    for b in DTYPES:
        for a in (*FLOATS, *DTYPES):
            for m in (3, 19):
                yield Gemm(m, 65, 264, a=a, b=b, out="f32")
    for out in FLOATS:
        for a in ("bf16", "f16", "f32", "e4m3fn"):
            yield Gemm(5, 70, 136, a=a, out=out)
            yield Gemm(21, 70, 136, a=a, out=out, bias="f32", c=out)
    # Addends.
    for m in (2, 18):
        for bias, c in (("bf16", None), (None, "bf16"), ("f16", "f32"), ("f32", "out"), (None, "out")):
            yield Gemm(m, 67, 130, bias=bias, c=c)
            yield Gemm(m, 67, 130, a="e4m3fn", out="f32", bias=bias, c=c)
    # Scale grids: 1x128 for weights too, per row, per tensor, whole blocks wider than k.
    for block_b in ((1, 128), (1, 0), (0, 0), (128, 0), (0, 128), (32, 128), (128, 256), (48, 0), (1, 384)):
        for m in (4, 20):
            yield Gemm(m, 161, 300, block_b=block_b, out="f32")
    for block_a in ((1, 0), (0, 0), (128, 128), (1, 32), (3, 128), (1, 256)):
        for m in (4, 20):
            yield Gemm(m, 40, 300, a="e4m3fn", block_a=block_a)
    for m in (4, 20):
        yield Gemm(m, 161, 300, scale="ue8m0")
        yield Gemm(m, 161, 300, a="e5m2", scale="ue8m0", block_b=(1, 128))
    # Memory: rows apart, transposed (what nn, tn and tt pass), strided, expanded.
    for m in (3, 20):
        for layout in ("padded", "columns", "every_other", "expanded"):
            yield Gemm(m, 66, 267, layout_a=layout)
            yield Gemm(m, 66, 267, layout_b=layout)
            yield Gemm(m, 66, 267, a="e4m3fn", layout_a=layout, layout_b=layout, layout_scale=layout)
            if layout != "expanded":
                yield Gemm(m, 66, 267, layout_out=layout, c="out", bias="bf16")
                yield Gemm(m, 66, 267, layout_out=layout, c="f32")
    # Nothing to sum, nothing to write.
    for a in ("bf16", "e4m3fn"):
        yield Gemm(3, 5, 0, a=a, bias="f32", c="bf16")
        yield Gemm(20, 5, 0, a=a)
        yield Gemm(0, 5, 130, a=a)
        yield Gemm(3, 0, 130, a=a)
    # Hostile values.
    for m in (2, 19):
        for b in DTYPES:
            yield Gemm(m, 67, 267, a="f32", b=b, values="codes")
            yield Gemm(m, 67, 267, a=b, b=b, out="f32", values="codes")
            yield Gemm(m, 67, 267, a="f32", b=b, values="all codes")
        for values in ("outliers", "rows apart", "tiny", "huge", "zeros", "tiny scales", "huge scales", "scales apart"):
            yield Gemm(m, 66, 300, a="f32", values=values)
        for values in ("nan", "nan and inf", "nan scales"):
            yield Gemm(m, 66, 300, a="f32", values=values)
            yield Gemm(m, 66, 300, a="bf16", values=values, bias="f32")
        for values in ("zeros", "tiny scales", "huge scales", "scales apart", "nan scales"):
            yield Gemm(m, 66, 300, a="e4m3fn", out="f32", values=values)
        yield Gemm(m, 66, 300, a="e4m3fn", values="nan scales", scale="ue8m0")
        yield Gemm(m, 66, 300, a="f16", values="codes")  # overflows f16: infinities where the reference says so


CAST_OPS = ("per_token_cast_to_fp8", "per_block_cast_to_fp8", "per_channel_cast_to_fp8", "silu_mul_cast_to_fp8")


def _cast() -> Iterator[Cast]:
    for op in CAST_OPS:
        for rows, cols in ((1, 1), (1, 128), (5, 129), (130, 127), (3, 300), (200, 33), (129, 576), (0, 7), (7, 0)):
            yield Cast(op, rows, cols)
        yield Cast(op, 3, 4500, values="outliers")  # wider than what is cast at a time
        yield Cast(op, 130, 1300, values="outliers")
        for x in FLOATS:
            for format in MAX:
                yield Cast(op, 9, 267, x=x, format=format)
                yield Cast(op, 9, 267, x=x, format=format, round_scale_up=True)
        for layout in ("padded", "columns", "every_other", "expanded"):
            yield Cast(op, 131, 140, x="f32", layout=layout)
        for values in ("integers", "outliers", "rows apart", "tiny", "zeros", "nan", "nan and inf", "signed zeros",
                       "below smallest amax"):  # fmt: skip
            for format in MAX:
                yield Cast(op, 37, 150, x="f32", format=format, values=values)
            yield Cast(op, 37, 150, x="bf16", values=values, round_scale_up=True)
        if not op.startswith("silu_mul"):  # whose product overflows f32
            yield Cast(op, 37, 150, x="f32", values="huge")
        # As wide loads and stores want it, and just not so.
        for rows, cols in ((1, 8), (1, 128), (3, 576), (130, 264), (200, 40), (37, 4096), (129, 132), (5, 130)):
            yield Cast(op, rows, cols, layout="aligned", layout_out="aligned")
        for x in FLOATS:
            for format in MAX:
                up = format == "e5m2"
                yield Cast(op, 9, 272, x=x, format=format, round_scale_up=up, layout="aligned", layout_out="aligned")
            yield Cast(op, 37, 160, x=x, values="nan and inf", layout="aligned", layout_out="aligned")
        for values in ("outliers", "tiny", "signed zeros"):
            yield Cast(op, 37, 160, x="f32", values=values, layout="aligned", layout_out="aligned")


def _dequantize() -> Iterator[Dequantize]:
    for rows, cols in ((1, 1), (3, 127), (130, 300), (5, 576), (0, 7), (7, 0)):
        yield Dequantize(rows, cols)
    for format in MAX:
        for out in FLOATS:
            yield Dequantize(19, 141, format, out=out, values="all codes")
    for block in ((1, 128), (128, 1), (1, 0), (0, 0), (1, 32)):
        yield Dequantize(19, 141, block=block)
        yield Dequantize(19, 141, block=block, scale="ue8m0", out="bf16")
    for layout in ("padded", "columns", "every_other", "expanded"):
        yield Dequantize(19, 141, layout=layout)
    for values in ("tiny scales", "huge scales", "scales apart", "nan scales"):
        yield Dequantize(19, 300, values=values)
    # As wide loads and stores want it: with and without an end that is no whole piece, with a scale in it or several.
    for out in FLOATS:
        for rows, cols in ((1, 4), (130, 272), (5, 141), (3, 4103)):
            yield Dequantize(rows, cols, out=out, layout="aligned", layout_out="aligned")
        for format in MAX:
            yield Dequantize(19, 141, format, out=out, layout="aligned", layout_out="aligned", values="all codes")
        for block in ((128, 1), (1, 12)):
            yield Dequantize(19, 141, block=block, out=out, layout="aligned", layout_out="aligned")


GEMM = tuple(_gemm())
CAST = tuple(_cast())
DEQUANTIZE = tuple(_dequantize())


def exact(case: Gemm) -> Gemm | None:
    """The same problem on small integers, when its own values are ordinary ones."""
    return replace(case, values="integers") if case.values == "normal" else None
