"""FP8 in integer arithmetic: the same bits on every device and in the interpreter, whose own casts drop carries."""

import triton
import triton.language as tl
from triton import knobs

_INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def decode(code, FORMAT: tl.constexpr):
    """uint8 -> float16, exactly, subnormals and NaN too: 8 (or 7) binades away, all are float16's by their bits."""
    bits = code.to(tl.uint16)
    if FORMAT == "e5m2":
        return (bits << 8).to(tl.float16, bitcast=True)
    magnitude = bits & 0x7F
    value = (magnitude << 7 | (bits & 0x80) << 8).to(tl.float16, bitcast=True)
    nan = tl.full(code.shape, 0x7E00, tl.uint16).to(tl.float16, bitcast=True)
    if FORMAT == "e4m3fn":
        return tl.where(magnitude == 0x7F, nan, value * 256.0)
    return tl.where(bits == 0x80, nan, value * 128.0)


@triton.jit
def encode(x, FORMAT: tl.constexpr):
    """float32 -> uint8: nearest, ties to even, saturating; NaN stays NaN."""
    M: tl.constexpr = 2 if FORMAT == "e5m2" else 3
    BIAS: tl.constexpr = 15 if FORMAT == "e5m2" else 7 if FORMAT == "e4m3fn" else 8
    MOST: tl.constexpr = 57344.0 if FORMAT == "e5m2" else 448.0 if FORMAT == "e4m3fn" else 240.0
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    absolute = bits & 0x7FFFFFFF
    nan = absolute > 0x7F800000
    size = tl.where(nan, 0.0, tl.minimum(absolute.to(tl.float32, bitcast=True), MOST))
    kept = size.to(tl.uint32, bitcast=True)
    # normal: round where the mantissa ends, and move the exponent
    half: tl.constexpr = (1 << (22 - M)) - 1
    normal = ((kept + half + ((kept >> (23 - M)) & 1)) >> (23 - M)) - ((127 - BIAS) << M)
    # subnormal: added to a number whose last bit is the format's smallest, the sum is rounded by the addition
    magic: tl.constexpr = 1 - BIAS - M + 23 + 127
    anchor = tl.full(x.shape, magic << 23, tl.uint32)
    small = (size + anchor.to(tl.float32, bitcast=True)).to(tl.uint32, bitcast=True) - anchor
    code = tl.where(kept < ((128 - BIAS) << 23), small, normal)
    if FORMAT == "e4m3fnuz":
        code = tl.where(code == 0, 0, code | sign)  # no negative zero
        return tl.where(nan, 0x80, code).to(tl.uint8)
    quiet: tl.constexpr = 0x7E if FORMAT == "e5m2" else 0x7F
    return (tl.where(nan, quiet, code) | sign).to(tl.uint8)


@triton.jit
def rounded_up(scale):
    """To a power of two, where it is finite."""
    bits = scale.to(tl.uint32, bitcast=True)
    up = ((bits + 0x7FFFFF) & 0xFF800000).to(tl.float32, bitcast=True)
    return tl.where(bits < 0x7F800000, up, scale)


@triton.jit
def to_fnuz(code):
    """e4m3fn as e4m3fnuz of half the value: the same bits, but for -0, which has none, and NaN. uint8 -> float8e4b8."""
    code = tl.where(code == 0x80, 0, code)
    return tl.where((code & 0x7F) == 0x7F, 0x80, code).to(tl.uint8).to(tl.float8e4b8, bitcast=True)


@triton.jit
def load_scale(pointer, UE8M0: tl.constexpr):
    """Scales in float32."""
    if UE8M0:  # an exponent; 0 is 2^-127, a subnormal, and 255 NaN
        e = tl.load(pointer).to(tl.uint32)
        return tl.where(e == 255, 0x7FC00000, tl.where(e == 0, 0x00400000, e << 23)).to(tl.float32, bitcast=True)
    return tl.load(pointer)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 in the type of a result, to nearest even; the interpreter cuts bfloat16 off."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        up = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return tl.where(nan, 0x7FC0, up).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def _to_float32(x):
    """In the interpreter, which takes bfloat16 for integers and an FP8 NaN for a number."""
    if x.dtype == tl.float8e4nv:
        x = decode(x.to(tl.uint8, bitcast=True), "e4m3fn")
    elif x.dtype == tl.float8e4b8:
        x = decode(x.to(tl.uint8, bitcast=True), "e4m3fnuz")
    elif x.dtype == tl.float8e5:
        x = decode(x.to(tl.uint8, bitcast=True), "e5m2")
    return x.to(tl.float32)


@triton.jit
def dot(left, right):
    """The matrix instruction, summed in float32."""
    if _INTERPRETED:
        left, right = _to_float32(left), _to_float32(right)
    return tl.dot(left, right, input_precision="ieee")
