// Element-wise work on contiguous rows (RowOps), written once over the vector vocabulary.
#pragma once
#include "cpu/elements.h"
#include "cpu/gemm/decode.h"
#include "cpu/gemm/ukernel.h"
#include "cpu/quant/from_fp8.h"
#include "cpu/quant/to_fp8.h"
#include "cpu/side_by_side.h"
#include "moekern/float_formats.h"

namespace moekern::cpu {
namespace {

// The last n % W elements go through a padded copy, so that they take the same arithmetic.
struct Tail {
  alignas(64) float x[W] = {}, y[W] = {};
};

template <Dtype F>
inline void load_row(const char* src, int64_t n, float* dst) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(dst + i, load_as<F>(src, i));
  for (; i < n; ++i) dst[i] = element_as<F>(src, i);
}

// gemm/decode.h's arithmetic on one byte a lane, and the factor 2^(127 - bias) at once. The rare row
// with a NaN or an infinity is read again, slowly.
template <Dtype F>
inline void load_fp8_row(const uint8_t* src, int64_t n, float* dst) {
  constexpr Fp8Layout f = layout_of(F);
  const I32 mask = set1_i32(Decode<F>::kMask), magnitude = set1_i32(0x7f);
  const F32 factor = as_f32(set1_i32(static_cast<uint32_t>(254 - f.bias) << 23));
  I32 top = set1_i32(0);
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const I32 code = load_u8(src + i);
    top = max_i32(top, f.nan_is_minus_zero ? code : bit_and(code, magnitude));
    store(dst + i, mul(as_f32(bit_and(sra32<Decode<F>::kShift>(shl32<24>(code)), mask)), factor));
  }
  alignas(64) uint32_t tops[W];
  store_i32(tops, top);
  bool special = false;
  for (int j = 0; j < W; ++j) special |= tops[j] > (f.nan_is_minus_zero ? 0x7f : f.max_code);
  if (special) i = 0;
  for (; i < n; ++i) dst[i] = fp8_to_f32(F, src[i]);
}

void row_load(Dtype t, const char* src, int64_t n, float* dst) {
  const auto* codes = reinterpret_cast<const uint8_t*>(src);
  switch (t) {
    case Dtype::f32: return copy(dst, reinterpret_cast<const float*>(src), n);
    case Dtype::bf16: return load_row<Dtype::bf16>(src, n, dst);
    case Dtype::f16: return load_row<Dtype::f16>(src, n, dst);
    case Dtype::e5m2: return load_fp8_row<Dtype::e5m2>(codes, n, dst);
    case Dtype::e4m3fnuz: return load_fp8_row<Dtype::e4m3fnuz>(codes, n, dst);
    default: return load_fp8_row<Dtype::e4m3fn>(codes, n, dst);
  }
}

template <Dtype T>
inline void store_row(const float* src, int64_t n, char* dst) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store_as<T>(dst, i, load(src + i));
  for (; i < n; ++i) store_element_as<T>(dst, i, src[i]);
}

void row_store(Dtype t, const float* src, int64_t n, char* dst) {
  switch (t) {
    case Dtype::bf16: return store_row<Dtype::bf16>(src, n, dst);
    case Dtype::f16: return store_row<Dtype::f16>(src, n, dst);
    default: copy(reinterpret_cast<float*>(dst), src, n);
  }
}

void row_scale(const float* x, float s, int64_t n, float* dst) {
  const F32 sv = set1(s);
  int64_t i = 0;
  for (; i + W <= n; i += W) store(dst + i, mul(load(x + i), sv));
  for (; i < n; ++i) dst[i] = x[i] * s;
}

// exp(x) for x in [-87.3, 88]: 2^n * e^r with n = rint(x / ln 2), |r| <= ln 2 / 2, and the Taylor
// polynomial to r^7 (remainder 0.347^8 / 8! = 5e-9 < 2^-24).
template <class V>
[[gnu::always_inline]] inline V exp_clamped(V x) {
  const V bounded = min(set1(88.f), max(set1(-87.3f), x));
  const V magic = set1(0x1.8p23f);
  const V shifted = fma(bounded, set1(1.44269504089f), magic), n = sub(shifted, magic);
  const V r = fma(n, set1(-1.42860677e-6f), fma(n, set1(-0.693145752f), bounded));  // ln 2 in two parts
  V p = set1(1.f / 5040);
  const float coefficients[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f};
#pragma GCC unroll 7
  for (float c : coefficients) p = fma(p, r, V(set1(c)));
  return as_f32(add_i32(bits(p), shl32<23>(bits(shifted))));
}

// Beyond the clamp runs on to infinity.
template <class V>
[[gnu::always_inline]] inline V exp_to_infinity(V x) {
  return add(exp_clamped(x), mul(max(zero(), sub(x, set1(88.f))), set1(3e38f)));
}

// Below the clamp runs on to zero, within one unit of x.
template <class V>
inline V exp_to_zero(V x) {
  return mul(exp_clamped(x), min(set1(1.f), max(zero(), add(x, set1(88.3f)))));
}

// g / (1 + e^-x): where e^-x is infinite the result is -0, and NaN if g is -infinity.
template <class V>
[[gnu::always_inline]] inline V over_one_plus_exp(V g, V minus_x) {
  return div(g, add(set1(1.f), exp_to_infinity(minus_x)));
}

// erfc(z) for z >= 0 = t e^(-z^2 + P(t)), t = 1 / (1 + z / 2), within 1.2e-7 of it everywhere: the Chebyshev
// fit of Press et al., Numerical Recipes, section 6.2.
template <class V>
[[gnu::always_inline]] inline V erfc_positive(V z) {
  const V t = div(set1(1.f), fma(set1(0.5f), z, set1(1.f)));
  V p = set1(0.17087277f);
  const float coefficients[] = {-0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f,
                                0.09678418f,  0.37409196f, 1.00002368f,  -1.26551223f};
#pragma GCC unroll 9
  for (float c : coefficients) p = fma(p, t, V(set1(c)));
  return mul(t, exp_clamped(sub(p, mul(z, z))));
}

template <Activation A, class V>
[[gnu::always_inline]] inline V activated(V g, float alpha) {
  if constexpr (A == Activation::swiglu) return over_one_plus_exp(g, mul(set1(-alpha), g));
  // (1 + tanh z) / 2 = 1 / (1 + e^-2z), z = sqrt(2 / pi) (g + 0.044715 g^3)
  if constexpr (A == Activation::gelu_tanh)
    return over_one_plus_exp(g, mul(mul(set1(-1.595769122f), g), fma(mul(set1(0.044715f), g), g, set1(1.f))));
  // g Phi(g) = max(g, 0) - |g| erfc(|g| / sqrt 2) / 2, and from 14 on erfc is 0 in f32
  const V magnitude = min(set1(14.f), as_f32(magnitude_of(g)));
  return sub(max(zero(), g), mul(mul(set1(0.5f), magnitude), erfc_positive(mul(set1(0.707106781f), magnitude))));
}

template <Activation A, class V>
[[gnu::always_inline]] inline V gated(const Gating& f, V g, V u) {
  const V limit = set1(f.limit);  // min and max give their second operand where one is NaN
  const V up = max(set1(-f.limit), min(limit, u));
  return mul(activated<A>(min(limit, g), f.alpha), f.beta == 0.f ? up : add(up, set1(f.beta)));
}

template <Activation A, Dtype F>
void gated_row(const Gating& f, const char* gate, const char* up, int64_t n, float* dst, int64_t ahead) {
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    prefetch(gate + ahead + i * size_of(F), 4 * W * size_of(F));
    prefetch(up + ahead + i * size_of(F), 4 * W * size_of(F));
    F32s g, u;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      g.v[j] = load_as<F>(gate, i + j * W);
      u.v[j] = load_as<F>(up, i + j * W);
    }
    const F32s y = gated<A>(f, g, u);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) store(dst + i + j * W, y.v[j]);
  }
  for (; i < n; i += W) {
    const int64_t count = n - i < W ? n - i : W;
    Tail tail;
    for (int64_t j = 0; j < count; ++j) {
      tail.x[j] = element_as<F>(gate, i + j);
      tail.y[j] = element_as<F>(up, i + j);
    }
    store(tail.x, gated<A>(f, load(tail.x), load(tail.y)));
    copy(dst + i, tail.x, count);
  }
}

template <Activation A>
inline void gated_from(const Gating& f, Dtype t, const char* gate, const char* up, int64_t n, float* dst,
                       int64_t ahead) {
  switch (t) {
    case Dtype::bf16: return gated_row<A, Dtype::bf16>(f, gate, up, n, dst, ahead);
    case Dtype::f16: return gated_row<A, Dtype::f16>(f, gate, up, n, dst, ahead);
    default: return gated_row<A, Dtype::f32>(f, gate, up, n, dst, ahead);
  }
}

void row_gated(const Gating& f, Dtype t, const char* gate, const char* up, int64_t n, float* dst, int64_t ahead) {
  switch (f.activation) {
    case Activation::gelu: return gated_from<Activation::gelu>(f, t, gate, up, n, dst, ahead);
    case Activation::gelu_tanh: return gated_from<Activation::gelu_tanh>(f, t, gate, up, n, dst, ahead);
    default: return gated_from<Activation::swiglu>(f, t, gate, up, n, dst, ahead);
  }
}

constexpr RowOps kRowOps = {row_load, row_store, row_amax, row_scale, cast_panel, row_dequantize, row_gated};

}  // namespace
}  // namespace moekern::cpu
