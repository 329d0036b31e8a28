"""Each family of instructions that the emulator knows, against NumPy and ml_dtypes, on random and on awkward values."""

from __future__ import annotations

import emulator_ptx as ptx
import ml_dtypes
import numpy as np
import pytest

pytestmark = pytest.mark.skipif("not __import__('emulator_built').here()", reason="built without the emulator")

RNG = np.random.default_rng(11)
AWKWARD = np.array(
    [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, -3.4028235e38, 448.0,
     449.0, 464.0, 465.0, -500.0, 57344.0, 61440.0, 65504.0, 65519.0, 65520.0, 2.0**-9, 2.0**-10, 1.5 * 2.0**-10,
     2.0**-16, 2.0**-17, 2.0**-24, 2.0**-25, 0.5, 1.5, 2.5, -2.5, 2147483648.0, -2147483904.0, 4294967296.0, 1e20]
).astype(np.float32)  # fmt: skip


def floats(count: int = 640, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    random = (rng.standard_normal(count - AWKWARD.size) * 2.0 ** rng.integers(-20, 20, count - AWKWARD.size)).astype(
        "f4"
    )
    return rng.permutation(np.concatenate([AWKWARD, random]))


def integers(dtype: str, count: int = 640, seed: int = 0) -> np.ndarray:
    rng, info = np.random.default_rng(seed), np.iinfo(dtype)
    edges = np.array([info.min, info.max, 0, 1, info.max // 2, info.max - 1], dtype)
    return rng.permutation(np.concatenate([edges, rng.integers(info.min, info.max, count - 6, dtype, endpoint=True)]))


def same(got: np.ndarray, wanted: np.ndarray) -> None:
    wanted = wanted.astype(got.dtype)
    if got.dtype.kind in "iu":
        np.testing.assert_array_equal(got, wanted)
        return
    bits = f"u{got.itemsize}"
    nan = np.isnan(wanted.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), nan)
    np.testing.assert_array_equal(got.view(bits)[~nan], wanted.view(bits)[~nan])


@pytest.mark.parametrize("dtype", ["int16", "uint16", "int32", "uint32", "int64", "uint64"])
@pytest.mark.parametrize("name", ["add", "sub", "mul.lo", "min", "max", "and", "or", "xor"])
def test_integers(name, dtype):
    a, b = integers(dtype, seed=1), integers(dtype, seed=2)
    functions = {
        "add": np.add, "sub": np.subtract, "mul.lo": np.multiply, "min": np.minimum, "max": np.maximum,
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    }  # fmt: skip
    letter = "b" if name in ("and", "or", "xor") else dtype[0].replace("i", "s")
    with np.errstate(over="ignore"):
        same(ptx.elementwise(f"{name}.{letter}{a.itemsize * 8} %d, %a, %b;", [a, b], dtype), functions[name](a, b))


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "uint64"])
def test_quotients(dtype):
    a, b = integers(dtype, seed=3), integers(dtype, seed=4)
    b[b == 0] = 3
    b[::3] = RNG.integers(1, 100, b[::3].size)
    letter = dtype[0].replace("i", "s") + str(a.itemsize * 8)
    big = [(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    towards_zero = [abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) for x, y in big]
    wrap = (1 << (8 * a.itemsize)) - 1
    quotient = np.array([q & wrap for q in towards_zero], f"u{a.itemsize}").view(dtype)
    rest = np.array([(x - y * q) & wrap for (x, y), q in zip(big, towards_zero, strict=True)], f"u{a.itemsize}").view(
        dtype
    )
    same(ptx.elementwise(f"div.{letter} %d, %a, %b;", [a, b], dtype), quotient)
    same(ptx.elementwise(f"rem.{letter} %d, %a, %b;", [a, b], dtype), rest)


def test_wide_products():
    a, b, c = integers("int32", seed=5), integers("int32", seed=6), integers("int64", seed=7)
    wide = a.astype("int64") * b.astype("int64")
    same(ptx.elementwise("mul.wide.s32 %d, %a, %b;", [a, b], "int64"), wide)
    same(ptx.elementwise("mul.hi.s32 %d, %a, %b;", [a, b], "int32"), wide >> 32)
    with np.errstate(over="ignore"):
        same(ptx.elementwise("mad.wide.s32 %d, %a, %b, %c;", [a, b, c], "int64"), wide + c)
    u, v = integers("uint64", seed=8), integers("uint64", seed=9)
    high = np.array([int(x) * int(y) >> 64 for x, y in zip(u, v, strict=True)], "uint64")
    same(ptx.elementwise("mul.hi.u64 %d, %a, %b;", [u, v], "uint64"), high)


def test_shifts():
    a, n = integers("int32", seed=1), np.arange(640, dtype="uint32") % 70
    clamped = np.minimum(n, 31)
    same(ptx.elementwise("shr.s32 %d, %a, %b;", [a, n], "int32"), a >> clamped.astype("int32"))
    u = a.view("uint32")
    same(ptx.elementwise("shr.u32 %d, %a, %b;", [u, n], "uint32"), np.where(n > 31, 0, u >> clamped))
    same(ptx.elementwise("shl.b32 %d, %a, %b;", [u, n], "uint32"), np.where(n > 31, 0, u << clamped))
    b = integers("uint32", seed=2)
    both = b.astype("uint64") << 32 | u
    wrap = (n & 31).astype("uint64")
    same(ptx.elementwise("shf.l.wrap.b32 %d, %a, %b, %c;", [u, b, n], "uint32"), (both << wrap >> 32) & 0xFFFFFFFF)
    same(ptx.elementwise("shf.r.wrap.b32 %d, %a, %b, %c;", [u, b, n], "uint32"), both >> wrap & 0xFFFFFFFF)


def test_bit_fields():
    a, b = integers("uint32", seed=1), integers("uint32", seed=2)
    position, length = RNG.integers(0, 40, 640).astype("uint32"), RNG.integers(0, 40, 640).astype("uint32")
    rows = list(zip(a.tolist(), b.tolist(), position.tolist(), length.tolist(), strict=True))

    def signed_field(x: int, p: int, n: int) -> int:
        if n == 0:
            return 0
        sign = x >> min(p + n - 1, 31) & 1
        return sum((x >> (p + k) & 1 if k < n and p + k <= 31 else sign) << k for k in range(32))

    plain = [(x >> p) & ((1 << n) - 1) for x, _, p, n in rows]
    same(ptx.elementwise("bfe.u32 %d, %a, %b, %c;", [a, position, length], "uint32"), np.array(plain, "uint64"))
    same(ptx.elementwise("bfe.s32 %d, %a, %b, %c;", [a, position, length], "uint32"),
         np.array([signed_field(x, p, n) for x, _, p, n in rows], "uint64"))  # fmt: skip
    three = length % 20
    masks = [((1 << n) - 1) << 7 & 0xFFFFFFFF for n in three.tolist()]
    wanted = [(y & ~m) | (x << 7 & m) for (x, y, _, _), m in zip(rows, masks, strict=True)]
    same(ptx.elementwise("bfi.b32 %d, %a, %b, 7, %c;", [a, b, three], "uint32"), np.array(wanted, "uint64"))


@pytest.mark.parametrize("table", [0x80, 0x96, 0xE8, 0xCA, 0x01, 0xFE])
def test_lop3(table):
    a, b, c = (integers("uint32", seed=s) for s in (1, 2, 3))
    wanted = np.zeros(640, "uint32")
    for bit in range(8):
        if table >> bit & 1:
            wanted |= (a if bit & 4 else ~a) & (b if bit & 2 else ~b) & (c if bit & 1 else ~c)
    same(ptx.elementwise(f"lop3.b32 %d, %a, %b, %c, {table};", [a, b, c], "uint32"), wanted)


def test_prmt():
    a, b, c = (integers("uint32", seed=s) for s in (1, 2, 3))
    wanted = []
    for x, y, s in zip(a.tolist(), b.tolist(), c.tolist(), strict=True):
        data, r = (x | y << 32).to_bytes(8, "little"), 0
        for n in range(4):
            byte = data[s >> (4 * n) & 7]
            r |= (byte if not s >> (4 * n) & 8 else 255 * (byte >> 7)) << (8 * n)
        wanted.append(r)
    same(ptx.elementwise("prmt.b32 %d, %a, %b, %c;", [a, b, c], "uint32"), np.array(wanted, "uint64"))


def test_counting_bits():
    a = np.concatenate([integers("uint32"), np.array([0, 1, 2**31], "uint32")])
    same(ptx.elementwise("popc.b32 %d, %a;", [a], "uint32"), np.array([bin(x).count("1") for x in a.tolist()]))
    same(ptx.elementwise("clz.b32 %d, %a;", [a], "uint32"), np.array([32 - x.bit_length() for x in a.tolist()]))
    same(
        ptx.elementwise("brev.b32 %d, %a;", [a], "uint32"),
        np.array([int(f"{x:032b}"[::-1], 2) for x in a.tolist()], "u8"),
    )
    top = np.array([x.bit_length() - 1 & 0xFFFFFFFF for x in a.tolist()], "u8")
    same(ptx.elementwise("bfind.u32 %d, %a;", [a], "uint32"), top)


def test_pairs_of_integers():
    a, b = integers("uint16", 1280, 1), integers("uint16", 1280, 2)
    got = ptx.elementwise("max.u16x2 %d, %a, %b;", [a.view("u4"), b.view("u4")], "uint32")
    same(got.view("uint16"), np.maximum(a, b))


def test_carries():
    a, b = integers("uint32", seed=1), integers("uint32", seed=2)
    got = ptx.elementwise("add.cc.u32 %d, %a, %b; addc.u32 %d, 0, 0;", [a, b], "uint32")
    same(got, (a.astype("u8") + b) >> 32)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div.rn"])
def test_floats(name):
    a, b = floats(seed=1), floats(seed=2)
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div.rn": np.divide}[name]
    with np.errstate(all="ignore"):
        same(ptx.elementwise(f"{name}.f32 %d, %a, %b;", [a, b], "float32"), function(a, b))
        same(ptx.elementwise(f"{name}.f64 %d, %a, %b;", [a.astype("f8"), b.astype("f8")], "float64"),
             function(a.astype("f8"), b.astype("f8")))  # fmt: skip


def test_fma_rounds_once():
    a, b, c = (np.random.default_rng(s).standard_normal(640).astype("f4") for s in (1, 2, 3))
    c = (-a * b).astype("f4") + c * np.float32(1e-7)  # cancels: a product rounded before the sum shows
    got = ptx.elementwise("fma.rn.f32 %d, %a, %b, %c;", [a, b, c], "float32")
    exact = a.astype("f8") * b  # 48 bits
    high = exact + c
    error = (exact - (high - (high - exact))) + (c - (high - exact))
    odd = high.view("i8") | ((error != 0) & (high != 0)).astype("i8")  # double rounding cannot show behind odd bits
    same(got, np.where(error == 0, high, odd.view("f8")).astype("f4"))
    assert (got != a * b + c).any()


def test_flushing_and_saturating():
    a, b = np.full(64, 1e-39, "f4"), np.full(64, 1.0, "f4")
    assert (ptx.elementwise("mul.f32 %d, %a, %b;", [a, b], "float32") == a).all()
    assert (ptx.elementwise("mul.ftz.f32 %d, %a, %b;", [a, b], "float32") == 0).all()
    x = floats()
    with np.errstate(invalid="ignore"):
        same(ptx.elementwise("add.sat.f32 %d, %a, 0f00000000;", [x], "float32"),
             np.where(np.isnan(x), 0, np.clip(x, 0, 1)) + np.float32(0))  # fmt: skip


@pytest.mark.parametrize("mode, towards", [("rz", 0), ("rm", -np.inf), ("rp", np.inf)])
def test_directed_rounding(mode, towards):
    a, b = (np.random.default_rng(s).standard_normal(640).astype("f4") for s in (1, 2))
    exact = a.astype("f8") * b
    near = exact.astype("f4")
    away = {"rz": np.abs(near) > np.abs(exact), "rm": near > exact, "rp": near < exact}[mode]
    target = np.zeros_like(near) if mode == "rz" else np.full_like(near, towards)
    same(
        ptx.elementwise(f"mul.{mode}.f32 %d, %a, %b;", [a, b], "float32"),
        np.where(away, np.nextafter(near, target), near),
    )


def test_minima_prefer_numbers():
    a, b = floats(seed=1), floats(seed=2)
    same(ptx.elementwise("min.f32 %d, %a, %b;", [a, b], "float32") + 0, np.fmin(a, b) + np.float32(0))
    same(ptx.elementwise("max.NaN.f32 %d, %a, %b;", [a, b], "float32") + 0, np.maximum(a, b) + np.float32(0))
    zeros = ptx.elementwise("max.f32 %d, %a, %b;", [np.full(32, -0.0, "f4"), np.zeros(32, "f4")], "float32")
    assert not np.signbit(zeros).any()


@pytest.mark.parametrize("name, function", [
    ("rcp.rn", lambda x: 1 / x), ("sqrt.rn", np.sqrt), ("ex2.approx", np.exp2), ("lg2.approx", np.log2),
    ("rsqrt.approx", lambda x: 1 / np.sqrt(x)), ("tanh.approx", np.tanh), ("sin.approx", np.sin),
])  # fmt: skip
def test_functions(name, function):
    x = np.abs(np.random.default_rng(3).standard_normal(640)).astype("f4") + np.float32(0.01)
    got = ptx.elementwise(f"{name}.f32 %d, %a;", [x], "float32")
    np.testing.assert_allclose(got, function(x.astype("f8")), rtol=1.2e-7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["add", "mul", "sub", "max"])
def test_halves(name, dtype):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    letters = "f16" if dtype == "float16" else "bf16"
    with np.errstate(all="ignore"):
        a, b = floats(seed=1).astype(kind), floats(seed=2).astype(kind)
        x, y = a.astype("f4"), b.astype("f4")
        wanted = {"add": x + y, "mul": x * y, "sub": x - y, "max": np.fmax(x, y)}[name].astype(kind)
        same(
            ptx.elementwise(f"{name}.{letters} %d, %a, %b;", [a.view("u2"), b.view("u2")], "uint16").view(kind), wanted
        )
        pairs = ptx.elementwise(f"{name}.{letters}x2 %d, %a, %b;", [a.view("u4"), b.view("u4")], "uint32")
        same(pairs.view(kind), wanted)


@pytest.mark.parametrize("comparison", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "geu", "num", "nan"])
def test_comparisons(comparison):
    a, b = floats(seed=1), floats(seed=2)
    b[::4] = a[::4]
    either = np.isnan(a) | np.isnan(b)
    plain = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b,
             "num": ~either, "nan": either}  # fmt: skip
    if comparison in plain:
        wanted = plain[comparison] & (~either if comparison == "ne" else True)
    else:
        wanted = plain[comparison[:2]] | either
    got = ptx.elementwise(f"setp.{comparison}.f32 %q, %a, %b; selp.b32 %d, 1, 0, %q;", [a, b], "uint32")
    same(got, wanted)


def test_comparisons_of_integers():
    a, b = integers("int32", seed=1), integers("int32", seed=2)
    got = ptx.elementwise("setp.lt.s32 %q, %a, %b; selp.b32 %d, %a, %b, %q;", [a, b], "int32")
    same(got, np.minimum(a, b))
    got = ptx.elementwise("setp.lo.u32 %q, %a, %b; selp.b32 %d, %a, %b, %q;", [a.view("u4"), b.view("u4")], "uint32")
    same(got, np.minimum(a.view("u4"), b.view("u4")))


FP8 = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


@pytest.mark.parametrize("name", FP8)
def test_floats_to_fp8(name):
    a, b = floats(seed=1), floats(seed=2)
    got = ptx.elementwise(f"cvt.rn.satfinite.{name}x2.f32 %d, %a, %b;", [a, b], "uint16").view(FP8[name]).reshape(-1, 2)
    largest = float(ml_dtypes.finfo(FP8[name]).max)
    for half, x in ((1, a), (0, b)):  # the first operand is the upper half
        same(np.ascontiguousarray(got[:, half]), np.clip(x, -largest, largest).astype(FP8[name]))


@pytest.mark.parametrize("name", FP8)
def test_fp8_to_halves(name):
    codes = np.arange(65536, dtype="u2")[::7].copy()
    got = ptx.elementwise(f"cvt.rn.f16x2.{name}x2 %d, %a;", [codes], "uint32").view("f2")
    same(got, codes.view(FP8[name]).astype("f2"))


@pytest.mark.parametrize("to, dtype", [("f16", "float16"), ("bf16", "bfloat16")])
def test_floats_to_halves(to, dtype):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    a, b = floats(6400, seed=1), floats(6400, seed=2)
    with np.errstate(over="ignore"):
        same(ptx.elementwise(f"cvt.rn.{to}.f32 %d, %a;", [a], "uint16").view(kind), a.astype(kind))
        pairs = ptx.elementwise(f"cvt.rn.{to}x2.f32 %d, %a, %b;", [a, b], "uint32").view(kind).reshape(-1, 2)
        same(np.ascontiguousarray(pairs[:, 1]), a.astype(kind))
    codes = np.arange(65536, dtype="u2")
    same(ptx.elementwise(f"cvt.f32.{to} %d, %a;", [codes], "float32"), codes.view(kind).astype("f4"))


@pytest.mark.parametrize("mode, function", [("rzi", np.trunc), ("rni", np.rint), ("rmi", np.floor), ("rpi", np.ceil)])
@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "uint64"])
def test_floats_to_integers(dtype, mode, function):
    x = floats()
    info = np.iinfo(dtype)
    wanted = [0 if np.isnan(v) else int(min(max(function(np.float64(v)), info.min), info.max))
              if np.isfinite(v) else (info.max if v > 0 else info.min) for v in x]  # fmt: skip
    wanted = [min(max(w, info.min), info.max) for w in wanted]
    same(
        ptx.elementwise(f"cvt.{mode}.{dtype[0].replace('i', 's')}{info.bits}.f32 %d, %a;", [x], dtype),
        np.array(wanted, dtype),
    )


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "uint64"])
def test_integers_to_floats(dtype):
    x = integers(dtype)
    letter = f"{dtype[0].replace('i', 's')}{np.iinfo(dtype).bits}"
    same(ptx.elementwise(f"cvt.rn.f32.{letter} %d, %a;", [x], "float32"), x.astype("f4"))
    same(ptx.elementwise(f"cvt.rn.f64.{letter} %d, %a;", [x], "float64"), x.astype("f8"))


def test_integers_to_integers():
    x = integers("int32")
    same(ptx.elementwise("cvt.s64.s32 %d, %a;", [x], "int64"), x)
    same(ptx.elementwise("cvt.u64.u32 %d, %a;", [x.view("u4")], "uint64"), x.view("u4"))
    same(ptx.elementwise("cvt.s32.s8 %d, %a;", [x.view("u4")], "int32"), x.astype("int8"))
    same(ptx.elementwise("cvt.sat.u8.s32 %d, %a;", [x], "uint32"), np.clip(x, 0, 255))
    same(ptx.elementwise("cvt.u16.u32 %d, %a;", [x.view("u4")], "uint16"), x.astype("u2"))


@pytest.mark.parametrize("mode", ["bfly", "down", "up", "idx"])
def test_shuffles(mode):
    x = integers("uint32", 64)
    lane = np.arange(32)
    source = {"bfly": lane ^ 5, "down": lane + 5, "up": lane - 5, "idx": np.full(32, 5)}[mode]
    source = np.where((source < 0) | (source > 31), lane, source)
    clamp = 0 if mode == "up" else 31
    got = ptx.elementwise(f"shfl.sync.{mode}.b32 %d, %a, 5, {clamp}, -1;", [x], "uint32")
    same(got, x.reshape(2, 32)[:, source].ravel())


def test_votes_matches_and_reductions():
    x = np.random.default_rng(5).integers(0, 4, 64).astype("u4")
    rows = x.reshape(2, 32)
    mask = lambda m: sum(int(v) << n for n, v in enumerate(m))  # noqa: E731
    ballot = np.repeat(np.array([mask(r == 1) for r in rows], "u8"), 32)
    same(ptx.elementwise("setp.eq.u32 %q, %a, 1; vote.sync.ballot.b32 %d, %q, -1;", [x], "uint32"), ballot)
    match = np.array([mask(r == v) for r in rows for v in r], "u8")
    same(ptx.elementwise("match.any.sync.b32 %d, %a, -1;", [x], "uint32"), match)
    same(ptx.elementwise("redux.sync.add.u32 %d, %a, -1;", [x], "uint32"), np.repeat(rows.sum(1), 32))
    signed = integers("int32", 64)
    same(
        ptx.elementwise("redux.sync.max.s32 %d, %a, -1;", [signed], "int32"),
        np.repeat(signed.reshape(2, 32).max(1), 32),
    )
    elected = ptx.elementwise("elect.sync _|%q, -1; selp.b32 %d, 1, 0, %q;", [x], "uint32")
    same(elected, np.arange(64) % 32 == 0)


def test_branches_that_lanes_take_apart():
    """A loop of as many turns as the lane's number says, and a meeting behind it."""
    n = np.arange(64, dtype="u4") % 32
    body = "mov.b32 %d, 0; LOOP: setp.eq.u32 %q, %a, 0; @%q bra OUT; add.u32 %d, %d, %a; sub.u32 %a, %a, 1; bra LOOP;"
    got = ptx.elementwise(body + "OUT: shfl.sync.idx.b32 %d, %d, 31, 31, -1;", [n], "uint32")
    same(got, np.full(64, 31 * 32 // 2))


def test_atomics():
    out, old = np.zeros(4, "u4"), np.zeros(96, "u4")
    body = """
.reg .b64 %out, %old, %at; .reg .b32 %t, %r, %v; .reg .f32 %f;
ld.param.u64 %out, [out]; ld.param.u64 %old, [old]; mov.u32 %t, %tid.x;
atom.global.add.u32 %r, [%out], 2; mul.wide.u32 %at, %t, 4; add.u64 %old, %old, %at; st.global.u32 [%old], %r;
red.global.max.u32 [%out+4], %t; atom.global.cas.b32 %v, [%out+8], 0, 77;
cvt.rn.f32.u32 %f, %t; red.global.add.f32 [%out+12], %f; ret;"""
    ptx.module(ptx.kernel(body, ".param .u64 out, .param .u64 old")).launch("k", 1, 96, [out, old])
    assert out[:3].tolist() == [192, 95, 77] and out.view("f4")[3] == 95 * 96 / 2
    np.testing.assert_array_equal(np.sort(old), np.arange(0, 192, 2))


def test_matrix_fragments():
    """ldmatrix and mma.sync: a 16 x 16 tile by 16 x 8."""
    rng = np.random.default_rng(2)
    a, b = (rng.integers(-8, 9, shape).astype(ml_dtypes.bfloat16) for shape in ((16, 16), (8, 16)))
    out = np.zeros((16, 8), "f4")
    body = """
.reg .b64 %pa, %pb, %out, %x; .reg .b32 %t, %s, %v, %r, %a<4>, %b<2>; .reg .f32 %c<4>; .reg .pred %p;
.shared .align 16 .b8 tile[768];
ld.param.u64 %pa, [pa]; ld.param.u64 %pb, [pb]; ld.param.u64 %out, [out]; mov.u32 %t, %tid.x; mov.u32 %s, tile;
mul.wide.u32 %x, %t, 16; add.u64 %pa, %pa, %x; mad.lo.u32 %r, %t, 16, %s;
ld.global.v4.b32 {%a0, %a1, %a2, %a3}, [%pa]; st.shared.v4.b32 [%r], {%a0, %a1, %a2, %a3};
setp.ge.u32 %p, %t, 16; @%p bra LOADED; add.u64 %pb, %pb, %x;
ld.global.v4.b32 {%a0, %a1, %a2, %a3}, [%pb]; st.shared.v4.b32 [%r+512], {%a0, %a1, %a2, %a3};
LOADED: bar.sync 0;
and.b32 %r, %t, 15; mad.lo.u32 %r, %r, 32, %s; shr.u32 %v, %t, 4; mad.lo.u32 %r, %v, 16, %r;
ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%a0, %a1, %a2, %a3}, [%r];
and.b32 %r, %t, 7; mad.lo.u32 %r, %r, 32, %s; shr.u32 %v, %t, 3; and.b32 %v, %v, 1; mad.lo.u32 %r, %v, 16, %r;
ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%b0, %b1}, [%r+512];
mov.f32 %c0, 0f00000000; mov.f32 %c1, %c0; mov.f32 %c2, %c0; mov.f32 %c3, %c0;
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
  {%c0, %c1, %c2, %c3}, {%a0, %a1, %a2, %a3}, {%b0, %b1}, {%c0, %c1, %c2, %c3};
mul.wide.u32 %x, %t, 8; add.u64 %out, %out, %x;
st.global.v2.f32 [%out], {%c0, %c1}; st.global.v2.f32 [%out+256], {%c2, %c3};
ret;"""
    ptx.module(ptx.kernel(body, ".param .u64 pa, .param .u64 pb, .param .u64 out")).launch(
        "k", 1, 32, [a.view("u2"), b.view("u2"), out]
    )
    np.testing.assert_array_equal(out, a.astype("f4") @ b.astype("f4").T)


def test_clusters():
    """Every CTA of a cluster writes into its neighbour's shared memory."""
    out = np.zeros(8, "u4")
    body = """
.reg .b32 %rank, %size, %s, %far, %v, %id; .reg .b64 %out, %x;
.shared .align 4 .b8 word[4];
mov.u32 %rank, %cluster_ctarank; mov.u32 %size, %cluster_nctarank; mov.u32 %s, word; mov.u32 %id, %ctaid.x;
add.u32 %v, %rank, 1; rem.u32 %v, %v, %size; mapa.shared::cluster.u32 %far, %s, %v;
barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
st.shared::cluster.u32 [%far], %id;
barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
ld.shared.u32 %v, [%s]; ld.param.u64 %out, [out]; mul.wide.u32 %x, %id, 4; add.u64 %out, %out, %x;
st.global.u32 [%out], %v; ret;"""
    ptx.module(ptx.kernel(body, ".param .u64 out")).launch("k", 8, 32, [out], cluster=4)
    assert out.tolist() == [3, 0, 1, 2, 7, 4, 5, 6]


def test_the_model_of_hopper_accumulation_loses_bits():
    """Terms are cut 13 bits behind the largest: 2^-6 beside 256 is gone, and kept by exact accumulation."""
    text = ptx.gemm()
    from moekern.backends.cuda.emulator import TensorMap

    a, b = (np.full((64, 128), 2.0**-3).astype(ml_dtypes.float8_e4m3fn) for _ in range(2))
    a[:, 0] = b[:, 0] = 16.0
    maps = [TensorMap(x.view("u1"), (64, 128), swizzle=128) for x in (a, b)]
    results = []
    for accumulation in ("exact", "hopper"):
        out = np.zeros((64, 64), "f4")
        ptx.module(text).launch("gemm", 1, 160, [*maps, out, 1], accumulation=accumulation)
        results.append(out[0, 0])
    assert results == [256 + 127 * 2.0**-6, 256.0]
