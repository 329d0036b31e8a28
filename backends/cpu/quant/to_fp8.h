// A panel of f32, f16 or bf16 -> FP8 with block scales, written once over the vector vocabulary: the largest
// magnitude of each block, the scales, the codes.
#pragma once

// Included after one simd/*.h: everything here is per ISA.
#include "cpu/elements.h"
#include "cpu/gemm/ukernel.h"
#include "moekern/float_formats.h"

namespace moekern::cpu {
namespace {

// ---- magnitudes --------------------------------------------------------------------------------------

// They compare like integers, and NaN is above infinity. bf16's and f16's do so too, two in a lane.
template <class V>
inline auto magnitude_of(V x) {
  return bit_and(bits(x), set1_i32(0x7fffffffu));
}

template <Dtype F> struct Magnitudes {
  static constexpr int kCount = 2 * W;  // elements in a vector
  static I32 load(const char* x, int64_t i) {
    return bit_and(load_i32(reinterpret_cast<const uint16_t*>(x) + i), set1_i16(0x7fff));
  }
  static I32 max(I32 a, I32 b) { return max_i16(a, b); }
  // The larger one of each lane, as f32.
  static F32 widen(I32 x) {
    const I32 top = max_i32(shl32<16>(x), bit_and(x, set1_i32(0xffff0000u)));
    if constexpr (F == Dtype::bf16) return as_f32(top);
    uint16_t words[W];
    store_low16(words, shr32<16>(top));
    return load_f16(words);
  }
};

template <> struct Magnitudes<Dtype::f32> {
  static constexpr int kCount = W;
  static I32 load(const char* x, int64_t i) { return magnitude_of(load_as<Dtype::f32>(x, i)); }
  static I32 max(I32 a, I32 b) { return max_i32(a, b); }
  static F32 widen(I32 x) { return as_f32(x); }
};

// The largest of n elements is in some lane.
template <Dtype F>
inline I32 amax_lanes(const char* x, int64_t n) {
  using M = Magnitudes<F>;
  I32 best[2] = {set1_i32(0), set1_i32(0)};
  int64_t i = 0;
  for (; i + 4 * M::kCount <= n; i += 4 * M::kCount)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) best[j % 2] = M::max(best[j % 2], M::load(x, i + j * M::kCount));
  if (i < n) {
    alignas(64) char rest[4 * sizeof(I32)] = {};
    __builtin_memcpy(rest, x + i * size_of(F), static_cast<size_t>((n - i) * size_of(F)));
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) best[j % 2] = M::max(best[j % 2], M::load(rest, j * M::kCount));
  }
  return M::max(best[0], best[1]);
}

float row_amax(const float* x, int64_t n) {
  alignas(64) uint32_t lanes[W];
  store_i32(lanes, amax_lanes<Dtype::f32>(reinterpret_cast<const char*>(x), n));
  uint32_t top = 0;
  for (uint32_t lane : lanes) top = lane > top ? lane : top;
  return bits_float(top);
}

// Over the rows of a panel: a vector for each block, whose largest is in some lane of it ...
template <Dtype F>
[[gnu::noinline]] void see_blocks(const char* x, int64_t n, I32* tops) {
  for (; n > 0; n -= kBlock, x += kBlock * size_of(F), ++tops)
    *tops = Magnitudes<F>::max(*tops, n < kBlock ? amax_lanes<F>(x, n) : amax_lanes<F>(x, kBlock));
}

// ... or an element for each column.
template <Dtype F>
[[gnu::noinline]] void see_columns(const char* x, int64_t n, I32* tops) {
  using M = Magnitudes<F>;
  for (; n >= M::kCount; n -= M::kCount, x += sizeof(I32), ++tops) *tops = M::max(*tops, M::load(x, 0));
  if (n > 0) {
    alignas(64) char rest[sizeof(I32)] = {};
    __builtin_memcpy(rest, x, static_cast<size_t>(n * size_of(F)));
    *tops = M::max(*tops, M::load(rest, 0));
  }
}

// ---- scales ------------------------------------------------------------------------------------------

constexpr float smallest_normal(Dtype t) {
  return t == Dtype::e5m2 ? 0x1p-14f : t == Dtype::e4m3fnuz ? 0x1p-7f : 0x1p-6f;
}

// What a panel knows of its blocks, or columns. Vectors run past the last one.
struct Blocks {
  static constexpr int64_t kRoom = kWidestPanel + 2 * W;
  I32 tops[kRoom * sizeof(float) / sizeof(I32)];  // of see_blocks or see_columns
  alignas(64) float amax[kRoom];
  alignas(64) float scale[kRoom];
  alignas(64) float inverse[kRoom];  // 1 / scale
  alignas(64) float normal[kRoom];   // scale * the format's smallest normal number
  bool bounded;                      // all x are finite, so that |x * inverse| <= max but for rounding
  // For columns of bf16: `inverse` times to_integer, in the order of bf16_lower and bf16_upper; `normal`'s upper
  // halves.
  alignas(64) float spread[kRoom];
  alignas(64) uint16_t normal_words[kRoom];
};

template <Dtype F>
inline void find_amax(Blocks& b, bool by_column, int64_t count) {
  const auto max = [](I32 x, I32 y) { return Magnitudes<F>::max(x, y); };
  for (int64_t i = 0; i < count; i += W)
    store(b.amax + i, by_column ? load_as<F>(reinterpret_cast<const char*>(b.tops), i)
                                : Magnitudes<F>::widen(reduce_rows(b.tops + i, max)));
}

template <Dtype F>
[[gnu::noinline]] void find_scales(Blocks& b, int64_t count, bool round_up) {
  I32 infinite = set1_i32(0);  // in its sign bits
  for (int64_t i = 0; i < count; i += W) {
    const F32 amax = load(b.amax + i);
    infinite = bit_or(infinite, add_i32(bits(amax), set1_i32(0x80000000u - kF32Inf)));
    F32 scale = div(max(set1(1e-4f), amax), set1(max_of(F)));  // `max` keeps a NaN on the right
    if (round_up) {  // to 2^ceil(log2 scale): it is not subnormal, and infinity stays
      const I32 power = bit_and(add_i32(bits(scale), set1_i32(0x7fffffu)), set1_i32(kF32Inf));
      scale = as_f32(if_nan(scale, bits(scale), power));
    }
    store(b.scale + i, scale);
    store(b.inverse + i, div(set1(1.f), scale));
    store(b.normal + i, mul(scale, set1(smallest_normal(F))));
  }
  alignas(64) uint32_t lanes[W];
  store_i32(lanes, infinite);
  b.bounded = true;
  for (uint32_t lane : lanes) b.bounded &= lane >> 31 == 0;
}

// ---- codes -------------------------------------------------------------------------------------------

// Codes with the sign bits of `signs`, in the same order. e4m3fnuz has no negative zero: there adding 0x7f
// reaches bit 7 for every other code.
template <Dtype F>
inline I32 with_signs(I32 codes, I32 signs) {
  if constexpr (layout_of(F).nan_is_minus_zero) signs = bit_and(signs, add_i8(codes, set1_i32(0x7f7f7f7fu)));
  return bit_or(codes, bit_and(signs, set1_i32(0x80808080u)));
}

template <bool kPastCaches>
inline void store_codes(uint8_t* dst, I32 codes) {
  kPastCaches ? store_past_caches(dst, codes) : store_i32(dst, codes);
}

inline void prefetch(const char* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

// rne(y), |y| <= max but for rounding, in bits 8 .. 15 of a lane. Adding 2^(23 - mantissa_bits) times the
// binade of y (subnormals share the smallest normal's) makes f32's own rounding act at the narrow format's
// last place: the low half of the sum then counts these places, the high half holds the binade. The factor
// has a low half of its own, which turns f32's exponent of the sum into the code's.
template <Dtype F>
inline I32 encode(F32 y) {
  constexpr Fp8Layout f = layout_of(F);
  constexpr int kExponent = 127 + 23 - f.mantissa_bits;  // of the factor
  constexpr uint32_t kOffset = static_cast<uint32_t>(kExponent + 1 - f.bias) << f.mantissa_bits;
  const F32 factor = as_f32(set1_i32(static_cast<uint32_t>(kExponent) << 23 | (0x10000u - kOffset)));
  const I32 binade = max_i32(bit_and(bits(y), set1_i32(kF32Inf)), bits(set1(smallest_normal(F))));
  return fold_halves<f.mantissa_bits + 1>(bits(fma(as_f32(binade), factor, as_f32(magnitude_of(y)))));
}

// 4W elements, of any type.
template <Dtype From, Dtype To>
inline I32 quantize_lanes(const char* x, int64_t i, const F32* scales) {
  F32 y[4];
  I32 codes[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) y[j] = mul(load_as<From>(x, i + j * W), scales[j]);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) codes[j] = encode<To>(y[j]);
  const I32 low = shr16<8>(narrow_i32(codes[0], codes[1])), high = shr16<8>(narrow_i32(codes[2], codes[3]));
  const I32 signs = signs_i16(signs_i32(bits(y[0]), bits(y[1])), signs_i32(bits(y[2]), bits(y[3])));
  return in_order_i32(with_signs<To>(narrow_i16(low, high), signs));
}

// What brings the format's smallest normal number to where f32's last place is the format's.
constexpr float to_integer(Dtype t) { return static_cast<float>(1 << layout_of(t).mantissa_bits) / smallest_normal(t); }

inline uint16_t upper_half(float x) { return static_cast<uint16_t>(float_bits(x) >> 16); }

template <Dtype To>
[[gnu::noinline]] void spread_columns(Blocks& b, int64_t count) {
  alignas(64) uint16_t words[2 * W];
  alignas(64) uint32_t order[2 * W];  // the word of each lane, in the upper half
  for (int j = 0; j < 2 * W; ++j) words[j] = static_cast<uint16_t>(j);
  store_i32(order, bits(bf16_lower(load_i32(words))));
  store_i32(order + W, bits(bf16_upper(load_i32(words))));
  for (int64_t i = 0; i < count; i += 2 * W)
    for (int j = 0; j < 2 * W; ++j) {
      b.spread[i + j] = b.inverse[i + (order[j] >> 16)] * to_integer(To);
      b.normal_words[i + j] = upper_half(b.normal[i + j]);
    }
}

constexpr int64_t kBf16Step = 8 * W;

// bf16, mostly in 16 bits: dividing x by the binade of its product (over the smallest normal's) leaves every
// product where the format's last place is 1 after scaling by to_integer. The binades are told apart by x and may
// be off by a bf16 where they meet: both give the same code there. From the start of each block as many elements
// as fill 8 vectors.
template <Dtype To, bool kByColumn, bool kPastCaches>
[[gnu::noinline]] void quantize_bf16(const uint16_t* x, const Blocks& blocks, int64_t n, uint8_t* dst,
                                     const char* next) {
  for (int64_t first = 0, b = 0; first < n; first += kBlock, ++b) {
    const int64_t end = n - first < kBlock ? n : first + kBlock;
    const F32 scale = set1(blocks.inverse[b] * to_integer(To));
    const I32 normal = set1_i16(upper_half(blocks.normal[b]));
    for (int64_t i = first; i + kBf16Step <= end; i += kBf16Step) {
      prefetch(next + 2 * i, 2 * kBf16Step);
      I32 words[4], rest[4], binade[4], codes[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) words[j] = load_i32(x + i + 2 * W * j);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) rest[j] = bit_and(words[j], set1_i16(0x7fff));
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const I32 from = kByColumn ? load_i32(blocks.normal_words + i + 2 * W * j) : normal;
        binade[j] = bit_and(subs_u16(rest[j], from), set1_i16(0xff80));
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) rest[j] = sub_i16(rest[j], binade[j]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const float* spread = blocks.spread + i + 2 * W * j;
        const I32 lower = round_i32(mul(bf16_lower(rest[j]), kByColumn ? load(spread) : scale));
        const I32 upper = round_i32(mul(bf16_upper(rest[j]), kByColumn ? load(spread + W) : scale));
        codes[j] = add_i16(narrow_i32(lower, upper), shr16<7 - layout_of(To).mantissa_bits>(binade[j]));
      }
#pragma GCC unroll 2
      for (int j = 0; j < 4; j += 2) {
        const I32 narrow = narrow_i16(codes[j], codes[j + 1]), signs = signs_i16(words[j], words[j + 1]);
        store_codes<kPastCaches>(dst + i + 2 * W * j, in_order_i16(with_signs<To>(narrow, signs)));
      }
    }
  }
}

// dst[i] = rne(clamp(x[i] * inverse of its block, +-max)). Where there is a NaN or an infinity, slowly.
template <Dtype From, Dtype To, bool kPastCaches>
[[gnu::noinline]] void quantize_row(const char* x, const Blocks& blocks, bool by_column, int64_t n, uint8_t* dst,
                                    const char* next) {
  const bool in_words = From == Dtype::bf16 && blocks.bounded;
  if constexpr (From == Dtype::bf16) {
    const auto* words = reinterpret_cast<const uint16_t*>(x);
    if (in_words)
      (by_column ? quantize_bf16<To, true, kPastCaches> : quantize_bf16<To, false, kPastCaches>)(words, blocks, n, dst,
                                                                                                 next);
    if (in_words && n % kBlock == 0) return;
  }
  for (int64_t i = 0; i < n;) {
    const int64_t b = i / kBlock, end = n - i < kBlock ? n : i + kBlock;
    if (in_words) i += (end - i) / kBf16Step * kBf16Step;
    const F32 one = set1(blocks.inverse[b]);
    if (blocks.bounded)
      for (; i + 4 * W <= end; i += 4 * W) {
        F32 scales[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) scales[j] = by_column ? load(blocks.inverse + i + j * W) : one;
        prefetch(next + i * size_of(From), 4 * W * size_of(From));
        store_codes<kPastCaches>(dst + i, quantize_lanes<From, To>(x, i, scales));
      }
    for (; i < end; ++i) dst[i] = f32_to_fp8(To, element_as<From>(x, i) * blocks.inverse[by_column ? i : b]);
  }
}

// ---- the panel ---------------------------------------------------------------------------------------

template <Dtype From, Dtype To, bool kPastCaches>
void cast_rows(const CastPanel& p) {
  Blocks blocks;
  float* scale = p.scale;
  for (int64_t j = 0; j < p.cols; j += p.width) {
    const int64_t n = p.cols - j < p.width ? p.cols - j : p.width;
    const int64_t count = p.by_column ? n : (n + kBlock - 1) / kBlock;
    const char* x = p.x + j * size_of(From);
    const char* next = j + n < p.cols ? x + n * size_of(From) : p.next;
    const int64_t tops = p.by_column ? n / Magnitudes<From>::kCount + 1 : (count + W - 1) / W * W;
    for (int64_t t = 0; t < tops; ++t) blocks.tops[t] = set1_i32(0);
    for (int64_t i = 0; i < p.rows; ++i)
      (p.by_column ? see_columns<From> : see_blocks<From>)(x + i * p.x_stride, n, blocks.tops);
    find_amax<From>(blocks, p.by_column, count);
    find_scales<To>(blocks, count, p.round_scale_up);
    if (p.scale_stride == 1) {
      copy(scale, blocks.scale, count);
    } else {
      for (int64_t b = 0; b < count; ++b) scale[b * p.scale_stride] = blocks.scale[b];
    }
    scale += count * p.scale_stride;
    if (From == Dtype::bf16 && p.by_column) spread_columns<To>(blocks, count);
    for (int64_t i = 0; i < p.rows; ++i)
      quantize_row<From, To, kPastCaches>(x + i * p.x_stride, blocks, p.by_column, n, p.q + i * p.q_stride + j,
                                          next + i * p.x_stride);
  }
}

template <Dtype From, Dtype To>
inline void cast_to(const CastPanel& p) {
  p.past_caches ? cast_rows<From, To, true>(p) : cast_rows<From, To, false>(p);
}

template <Dtype From>
inline void cast_from(Dtype to, const CastPanel& p) {
  switch (to) {
    case Dtype::e4m3fn: return cast_to<From, Dtype::e4m3fn>(p);
    case Dtype::e5m2: return cast_to<From, Dtype::e5m2>(p);
    default: return cast_to<From, Dtype::e4m3fnuz>(p);
  }
}

void cast_panel(Dtype from, Dtype to, const CastPanel& p) {
  switch (from) {
    case Dtype::bf16: return cast_from<Dtype::bf16>(to, p);
    case Dtype::f16: return cast_from<Dtype::f16>(to, p);
    default: return cast_from<Dtype::f32>(to, p);
  }
}

}  // namespace
}  // namespace moekern::cpu
