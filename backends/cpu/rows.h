// Element-wise work on contiguous rows (RowOps), written once over the vector vocabulary.
#pragma once
#include "cpu/gemm/ukernel.h"
#include "moekern/float_formats.h"

namespace moekern::cpu {
namespace {

// The last n % W elements go through a padded copy, so that they take the same arithmetic.
struct Tail {
  alignas(64) float x[W] = {}, y[W] = {};
};

inline void copy(float* dst, const float* src, int64_t n) { __builtin_memcpy(dst, src, static_cast<size_t>(n) * 4); }

void row_load(Dtype t, const char* src, int64_t n, float* dst) {
  int64_t i = 0;
  switch (t) {
    case Dtype::f32:
      copy(dst, reinterpret_cast<const float*>(src), n);
      return;
    case Dtype::bf16: {
      const auto* p = reinterpret_cast<const uint16_t*>(src);
      for (; i + W <= n; i += W) store(dst + i, load_bf16(p + i));
      for (; i < n; ++i) dst[i] = bf16_to_f32(p[i]);
      return;
    }
    case Dtype::f16: {
      const auto* p = reinterpret_cast<const uint16_t*>(src);
      for (; i + W <= n; i += W) store(dst + i, load_f16(p + i));
      for (; i < n; ++i) dst[i] = f16_to_f32(p[i]);
      return;
    }
    default: {
      const auto* p = reinterpret_cast<const uint8_t*>(src);
      for (; i < n; ++i) dst[i] = fp8_to_f32(t, p[i]);
    }
  }
}

inline I32 round_to_bf16(F32 x) {
  const I32 u = bits(x), odd = bit_and(shr32<16>(u), set1_i32(1));
  const I32 rounded = add_i32(add_i32(u, set1_i32(0x7fff)), odd);
  return shr32<16>(if_nan(x, bit_or(u, set1_i32(0x400000)), rounded));
}

void row_store(Dtype t, const float* src, int64_t n, char* dst) {
  int64_t i = 0;
  switch (t) {
    case Dtype::bf16: {
      auto* p = reinterpret_cast<uint16_t*>(dst);
      for (; i + W <= n; i += W) store_low16(p + i, round_to_bf16(load(src + i)));
      for (; i < n; ++i) p[i] = f32_to_bf16(src[i]);
      return;
    }
    case Dtype::f16: {
      auto* p = reinterpret_cast<uint16_t*>(dst);
      for (; i + W <= n; i += W) store_f16(p + i, load(src + i));
      for (; i < n; ++i) p[i] = f32_to_f16(src[i]);
      return;
    }
    default: copy(reinterpret_cast<float*>(dst), src, n);
  }
}

// Magnitudes compare like integers, and NaN is above infinity.
float row_amax(const float* x, int64_t n) {
  const I32 magnitude = set1_i32(0x7fffffffu);
  I32 best[4] = {set1_i32(0), set1_i32(0), set1_i32(0), set1_i32(0)};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) best[j] = max_i32(best[j], bit_and(bits(load(x + i + j * W)), magnitude));
  for (; i + W <= n; i += W) best[0] = max_i32(best[0], bit_and(bits(load(x + i)), magnitude));
  if (i < n) {
    Tail tail;
    copy(tail.x, x + i, n - i);
    best[1] = max_i32(best[1], bit_and(bits(load(tail.x)), magnitude));
  }
  alignas(64) uint32_t lanes[W];
  store_i32(lanes, max_i32(max_i32(best[0], best[1]), max_i32(best[2], best[3])));
  uint32_t top = 0;
  for (int j = 0; j < W; ++j) top = lanes[j] > top ? lanes[j] : top;
  return bits_float(top);
}

void row_scale(const float* x, float s, int64_t n, float* dst) {
  const F32 sv = set1(s);
  int64_t i = 0;
  for (; i + W <= n; i += W) store(dst + i, mul(load(x + i), sv));
  for (; i < n; ++i) dst[i] = x[i] * s;
}

// rne(clamp(x * s)) without a rounding table: adding 1.5 * 2^(23 - mantissa_bits) times the binade
// of y makes f32's own rounding act at the narrow format's last place (subnormals share the binade
// of the smallest normal); scaling by 2^(bias - 127) then puts the narrow exponent at the bottom of
// f32's, where a shift reads the code off.
template <Dtype F>
inline I32 encode(F32 x, F32 s) {
  constexpr Fp8Layout f = layout_of(F);
  const F32 y = max(set1(-max_of(F)), min(set1(max_of(F)), mul(x, s)));  // NaN passes through both
  const F32 smallest = as_f32(set1_i32(static_cast<uint32_t>(128 - f.bias) << 23));
  const F32 binade = max(as_f32(bit_and(bits(y), set1_i32(kF32Inf))), smallest);
  const F32 magic = mul(binade, set1(1.5f * static_cast<float>(1 << (23 - f.mantissa_bits))));
  const F32 rounded = sub(add(y, magic), magic);
  const I32 u = bits(mul(rounded, as_f32(set1_i32(static_cast<uint32_t>(f.bias) << 23))));
  // The sign is y's: what rounds to zero keeps it, and (y + magic) - magic does not.
  const I32 code = bit_or(bit_and(shr32<24>(bits(y)), set1_i32(0x80)), bit_and(shr32<23 - f.mantissa_bits>(u), set1_i32(0x7f)));
  return if_nan(y, bit_or(bit_and(shr32<24>(bits(x)), set1_i32(0x80)), set1_i32(f.nan_code)), code);
}

template <Dtype F>
inline void quantize_format(const float* x, float s, int64_t n, uint8_t* dst) {
  const F32 sv = set1(s);
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    store_low8(dst + i, encode<F>(load(x + i), sv), encode<F>(load(x + i + W), sv), encode<F>(load(x + i + 2 * W), sv),
               encode<F>(load(x + i + 3 * W), sv));
  for (; i < n; ++i) dst[i] = f32_to_fp8(F, x[i] * s);
}

void row_quantize(Dtype t, const float* x, float s, int64_t n, uint8_t* dst) {
  switch (t) {
    case Dtype::e4m3fn: return quantize_format<Dtype::e4m3fn>(x, s, n, dst);
    case Dtype::e5m2: return quantize_format<Dtype::e5m2>(x, s, n, dst);
    default:
      for (int64_t i = 0; i < n; ++i) dst[i] = f32_to_fp8(t, x[i] * s);
  }
}

// exp(x) for x in [-87.3, 88]: 2^n * e^r with n = rint(x / ln 2), |r| <= ln 2 / 2, and the Taylor
// polynomial to r^7 (remainder 0.347^8 / 8! = 5e-9 < 2^-24).
inline F32 exp_clamped(F32 x) {
  const F32 bounded = min(set1(88.f), max(set1(-87.3f), x));
  const F32 magic = set1(0x1.8p23f);
  const F32 shifted = fma(bounded, set1(1.44269504089f), magic), n = sub(shifted, magic);
  const F32 r = fma(n, set1(-1.42860677e-6f), fma(n, set1(-0.693145752f), bounded));  // ln 2 in two parts
  F32 p = set1(1.f / 5040);
  const float coefficients[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f};
#pragma GCC unroll 7
  for (float c : coefficients) p = fma(p, r, set1(c));
  return as_f32(add_i32(bits(p), shl32<23>(bits(shifted))));
}

// Beyond the clamp e^-gate runs on to infinity, so that silu is -0 there and NaN at -infinity.
inline F32 silu_mul(F32 gate, F32 up) {
  const F32 x = sub(zero(), gate);
  const F32 e = add(exp_clamped(x), mul(max(zero(), sub(x, set1(88.f))), set1(3e38f)));
  return mul(div(gate, add(set1(1.f), e)), up);
}

void row_silu_mul(const float* gate, const float* up, int64_t n, float* dst) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(dst + i, silu_mul(load(gate + i), load(up + i)));
  if (i < n) {
    Tail tail;
    copy(tail.x, gate + i, n - i);
    copy(tail.y, up + i, n - i);
    store(tail.x, silu_mul(load(tail.x), load(tail.y)));
    copy(dst + i, tail.x, n - i);
  }
}

constexpr RowOps kRowOps = {row_load, row_store, row_amax, row_scale, row_quantize, row_silu_mul};

}  // namespace
}  // namespace moekern::cpu
