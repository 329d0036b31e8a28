// Rows of f32, f16 or bf16 -> FP8, in the three steps of a cast: the largest magnitude of each block, the
// blocks' scales, the codes. Written once over the vector vocabulary.
#pragma once

// Included after one simd/*.h: everything here is per ISA.
#include "cpu/elements.h"
#include "cpu/gemm/ukernel.h"
#include "moekern/float_formats.h"

namespace moekern::cpu {
namespace {

// ---- the largest magnitude ---------------------------------------------------------------------------

// Magnitudes compare like integers, and NaN is above infinity; so do bf16's and f16's, two in a lane.
inline I32 magnitude_of(F32 x) { return bit_and(bits(x), set1_i32(0x7fffffffu)); }

template <Dtype F> struct Magnitudes {
  static constexpr int kCount = 2 * W;  // elements in a vector
  static I32 load(const char* x, int64_t i) {
    return bit_and(load_i32(reinterpret_cast<const uint16_t*>(x) + i), set1_i16(0x7fff));
  }
  static I32 max(I32 a, I32 b) { return max_i16(a, b); }
  static uint32_t reduce(I32 x) {  // the largest, as the bits of f32
    const uint32_t top = reduce_max_i32(max_i32(shl32<16>(x), bit_and(x, set1_i32(0xffff0000u))));
    return F == Dtype::bf16 ? top : float_bits(f16_to_f32(static_cast<uint16_t>(top >> 16)));
  }
};

template <> struct Magnitudes<Dtype::f32> {
  static constexpr int kCount = W;
  static I32 load(const char* x, int64_t i) { return magnitude_of(load_as<Dtype::f32>(x, i)); }
  static I32 max(I32 a, I32 b) { return max_i32(a, b); }
  static uint32_t reduce(I32 x) { return reduce_max_i32(x); }
};

template <Dtype F>
inline uint32_t amax_bits(const char* x, int64_t i, int64_t end) {
  using M = Magnitudes<F>;
  I32 best[4] = {set1_i32(0), set1_i32(0), set1_i32(0), set1_i32(0)};
  for (; i + 4 * M::kCount <= end; i += 4 * M::kCount)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) best[j] = M::max(best[j], M::load(x, i + j * M::kCount));
  uint32_t top = M::reduce(M::max(M::max(best[0], best[1]), M::max(best[2], best[3])));
  for (; i < end; ++i) {
    const uint32_t magnitude = float_bits(element_as<F>(x, i)) & 0x7fffffffu;
    top = magnitude > top ? magnitude : top;
  }
  return top;
}

template <Dtype F>
inline void amax_row(const char* x, int64_t n, int64_t block, float* amax) {
  int64_t i = 0;
  if (block == 1)
    for (; i + W <= n; i += W) store_i32(amax + i, max_i32(load_i32(amax + i), magnitude_of(load_as<F>(x, i))));
  for (; i < n; i += block) {
    const uint32_t top = amax_bits<F>(x, i, n - i < block ? n : i + block);
    if (top > float_bits(amax[i / block])) amax[i / block] = bits_float(top);
  }
}

void row_amax(Dtype t, const char* x, int64_t n, int64_t block, float* amax) {
  switch (t) {
    case Dtype::bf16: return amax_row<Dtype::bf16>(x, n, block, amax);
    case Dtype::f16: return amax_row<Dtype::f16>(x, n, block, amax);
    default: return amax_row<Dtype::f32>(x, n, block, amax);
  }
}

// ---- the scales --------------------------------------------------------------------------------------

constexpr float smallest_normal(Dtype t) {
  return layout_of(t).bias == 15 ? 0x1p-14f : layout_of(t).bias == 8 ? 0x1p-7f : 0x1p-6f;
}

// The vectors end beyond n: amax is zero there, and the others have the room.
bool row_block_scales(const float* amax, int64_t n, Dtype to, bool round_up, float* scale, float* inverse,
                      float* normal_from) {
  const F32 largest = set1(max_of(to)), smallest = set1(smallest_normal(to));
  I32 top = set1_i32(0);
  for (int64_t i = 0; i < n; i += W) {
    const F32 a = load(amax + i);
    top = max_i32(top, bits(a));
    F32 s = div(max(set1(1e-4f), a), largest);  // `max` keeps a NaN on the right
    if (round_up) {                             // 2^ceil(log2 s): s is no subnormal, and infinity stays
      const I32 power = bit_and(add_i32(bits(s), set1_i32(0x7fffffu)), set1_i32(kF32Inf));
      s = as_f32(if_nan(s, bits(s), power));
    }
    const F32 inv = div(set1(1.f), s);
    // The least bf16 whose product with `inv` rounds to `smallest` or more. It is next to smallest * s.
    const I32 below = bit_and(bits(mul(s, smallest)), set1_i32(0xffff0000u));
    const I32 missing = add_i32(bits(mul(as_f32(below), inv)), set1_i32(0u - float_bits(smallest_normal(to))));
    store(scale + i, s);
    store(inverse + i, inv);
    store_i32(normal_from + i, add_i32(below, bit_and(sra32<31>(missing), set1_i32(0x10000))));
  }
  return reduce_max_i32(top) < kF32Inf;
}

// ---- the codes ---------------------------------------------------------------------------------------

// Codes with the sign bits of `signs`, in the same order. e4m3fnuz has no negative zero: there adding 0x7f
// reaches bit 7 for every other code.
template <Dtype F>
inline I32 with_signs(I32 codes, I32 signs) {
  if constexpr (layout_of(F).nan_is_minus_zero) signs = bit_and(signs, add_i8(codes, set1_i32(0x7f7f7f7fu)));
  return bit_or(codes, bit_and(signs, set1_i32(0x80808080u)));
}

inline void store_codes(uint8_t* dst, I32 codes, bool past_caches) {
  past_caches ? store_past_caches(dst, codes) : store_i32(dst, codes);
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

// 4W elements, any type, any scales.
template <Dtype From, Dtype To, bool kScaleEach>
inline void quantize_lanes(const char* x, int64_t i, const float* s, uint8_t* dst, bool past_caches) {
  const F32 one = set1(*s);
  F32 y[4];
  I32 codes[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) y[j] = mul(load_as<From>(x, i + j * W), kScaleEach ? load(s + j * W) : one);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) codes[j] = encode<To>(y[j]);
  const I32 low = shr16<8>(narrow_i32(codes[0], codes[1])), high = shr16<8>(narrow_i32(codes[2], codes[3]));
  const I32 signs = signs_i16(signs_i32(bits(y[0]), bits(y[1])), signs_i32(bits(y[2]), bits(y[3])));
  store_codes(dst + i, in_order_i32(with_signs<To>(narrow_i16(low, high), signs)), past_caches);
}

// N vectors of bf16 with one scale, mostly in 16 bits: dividing x by its product's binade (over the smallest
// normal's) brings every product to where the format's last place is 1 after a scaling by `to_integer`.
template <Dtype To, int N>
inline void quantize_bf16(const uint16_t* x, F32 scale, I32 normal_from, uint8_t* dst, bool past_caches) {
  constexpr Fp8Layout f = layout_of(To);
  I32 words[N], binade[N], rest[N], codes[N];
  F32 lower[N], upper[N];
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) words[j] = load_i32(x + 2 * W * j);
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) rest[j] = bit_and(words[j], set1_i16(0x7fff));
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) binade[j] = bit_and(subs_u16(rest[j], normal_from), set1_i16(0xff80));
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) rest[j] = sub_i16(rest[j], binade[j]);
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    lower[j] = mul(bf16_lower(rest[j]), scale);
    upper[j] = mul(bf16_upper(rest[j]), scale);
  }
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j)
    codes[j] = add_i16(narrow_i32(round_i32(lower[j]), round_i32(upper[j])), shr16<7 - f.mantissa_bits>(binade[j]));
#pragma GCC unroll 4
  for (int j = 0; j < N; j += 2) {
    const I32 narrow = narrow_i16(codes[j], codes[j + 1]), signs = signs_i16(words[j], words[j + 1]);
    store_codes(dst + 2 * W * j, in_order_i16(with_signs<To>(narrow, signs)), past_caches);
  }
}

inline void prefetch(const char* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

// Rows with NaN or infinity take the slow way.
template <Dtype From, Dtype To>
inline void quantize_row(const char* x, const BlockScales& blocks, int64_t n, uint8_t* dst, const char* next,
                         bool past_caches) {
  constexpr Fp8Layout f = layout_of(To);
  constexpr int64_t kSize = size_of(From);
  for (int64_t i = 0; i < n;) {
    const int64_t block = i / blocks.size, end = blocks.size == 1 || n - i < blocks.size ? n : i + blocks.size;
    const float* s = blocks.inverse + block;
    if (blocks.bounded && blocks.size == 1) {
      for (; i + 4 * W <= end; i += 4 * W) {
        prefetch(next + i * kSize, 4 * W * kSize);
        quantize_lanes<From, To, true>(x, i, blocks.inverse + i, dst, past_caches);
      }
    } else if (blocks.bounded && From == Dtype::bf16) {
      constexpr float kToInteger = static_cast<float>(1 << f.mantissa_bits) / smallest_normal(To);
      const auto* words = reinterpret_cast<const uint16_t*>(x);
      const F32 scale = set1(*s * kToInteger);
      const I32 normal_from = set1_i16(static_cast<uint16_t>(float_bits(blocks.normal_from[block]) >> 16));
      for (; i + 8 * W <= end; i += 8 * W) {
        prefetch(next + i * kSize, 8 * W * kSize);
        quantize_bf16<To, 4>(words + i, scale, normal_from, dst + i, past_caches);
      }
      for (; i + 4 * W <= end; i += 4 * W) quantize_bf16<To, 2>(words + i, scale, normal_from, dst + i, past_caches);
    } else if (blocks.bounded) {
      for (; i + 4 * W <= end; i += 4 * W) {
        prefetch(next + i * kSize, 4 * W * kSize);
        quantize_lanes<From, To, false>(x, i, s, dst, past_caches);
      }
    }
    for (; i < end; ++i) dst[i] = f32_to_fp8(To, element_as<From>(x, i) * blocks.inverse[i / blocks.size]);
  }
}

template <Dtype From>
inline void quantize_from(const char* x, const BlockScales& blocks, int64_t n, Dtype to, uint8_t* dst, const char* next,
                          bool past_caches) {
  switch (to) {
    case Dtype::e4m3fn: return quantize_row<From, Dtype::e4m3fn>(x, blocks, n, dst, next, past_caches);
    case Dtype::e5m2: return quantize_row<From, Dtype::e5m2>(x, blocks, n, dst, next, past_caches);
    default: return quantize_row<From, Dtype::e4m3fnuz>(x, blocks, n, dst, next, past_caches);
  }
}

void row_quantize(Dtype from, const char* x, const BlockScales& blocks, int64_t n, Dtype to, uint8_t* dst,
                  const char* next, bool past_caches) {
  switch (from) {
    case Dtype::bf16: return quantize_from<Dtype::bf16>(x, blocks, n, to, dst, next, past_caches);
    case Dtype::f16: return quantize_from<Dtype::f16>(x, blocks, n, to, dst, next, past_caches);
    default: return quantize_from<Dtype::f32>(x, blocks, n, to, dst, next, past_caches);
  }
}

}  // namespace
}  // namespace moekern::cpu
