// Conversions between f32 and the narrow formats, one value at a time, in integer arithmetic: they
// give the same bits whatever the compiler, the rounding mode or the flush-to-zero state.
#pragma once
#include <cstdint>
#include <cstring>

#include "moekern/dtype.h"

namespace moekern {
// Everything is static: an ISA file that includes this keeps its own copies (see simd/avx2.h).

static inline uint32_t float_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

static inline float bits_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

constexpr uint32_t kF32Nan = 0x7fc00000u, kF32Inf = 0x7f800000u;

// The layout of an FP8 format: 1 sign bit, then exponent, then mantissa.
struct Fp8Layout {
  int mantissa_bits, bias;
  uint8_t max_code;  // the largest finite magnitude
  uint8_t nan_code;  // magnitude bits of NaN (e4m3fnuz has only 0x80)
  bool has_inf, nan_is_minus_zero;
};

constexpr Fp8Layout layout_of(Dtype t) {
  return t == Dtype::e5m2       ? Fp8Layout{2, 15, 0x7b, 0x7e, true, false}
         : t == Dtype::e4m3fnuz ? Fp8Layout{3, 8, 0x7f, 0x80, false, true}
                                : Fp8Layout{3, 7, 0x7e, 0x7f, false, false};
}

// max finite: 448, 240, 57344
constexpr float max_of(Dtype t) { return t == Dtype::e5m2 ? 57344.f : t == Dtype::e4m3fnuz ? 240.f : 448.f; }

static inline float fp8_to_f32(Dtype t, uint8_t code) {
  const Fp8Layout f = layout_of(t);
  const uint32_t sign = static_cast<uint32_t>(code & 0x80) << 24, magnitude = code & 0x7f;
  if (f.nan_is_minus_zero ? code == 0x80 : magnitude > f.max_code && !(f.has_inf && magnitude == 0x7c))
    return bits_float(kF32Nan);
  if (f.has_inf && magnitude == 0x7c) return bits_float(sign | kF32Inf);
  const uint32_t exponent = magnitude >> f.mantissa_bits, mantissa = magnitude & ((1u << f.mantissa_bits) - 1);
  if (exponent == 0) {  // mantissa * 2^(1 - bias - mantissa_bits): exact in f32
    const float ulp = bits_float(static_cast<uint32_t>(127 + 1 - f.bias - f.mantissa_bits) << 23);
    return bits_float(sign | float_bits(static_cast<float>(mantissa) * ulp));
  }
  return bits_float(sign | (exponent + 127 - f.bias) << 23 | mantissa << (23 - f.mantissa_bits));
}

// Round to nearest even of clamp(x, +-max); NaN stays NaN.
static inline uint8_t f32_to_fp8(Dtype t, float x) {
  const Fp8Layout f = layout_of(t);
  const uint32_t u = float_bits(x), sign = u >> 24 & 0x80, magnitude = u & 0x7fffffffu;
  if (magnitude > kF32Inf) return static_cast<uint8_t>(f.nan_is_minus_zero ? 0x80 : sign | f.nan_code);
  // All magnitudes are scaled so that one unit of the narrow ulp is `shift` bits of an integer.
  const int exponent = static_cast<int>(magnitude >> 23);
  const uint64_t significand = exponent ? (magnitude & 0x7fffffu) | 0x800000u : magnitude & 0x7fffffu;
  const int unbiased = (exponent ? exponent : 1) - 127;
  const int smallest = 1 - f.bias;  // exponent of the smallest normal
  const int shift = 23 - f.mantissa_bits + (unbiased < smallest ? smallest - unbiased : 0);
  uint32_t code = 0;
  if (shift < 40) {
    const uint64_t half = uint64_t{1} << (shift - 1), even = significand >> shift & 1;
    const uint64_t rounded = (significand + half - 1 + even) >> shift;
    // Adding the exponent lets a mantissa carry run into it.
    code = static_cast<uint32_t>(rounded) +
           (unbiased < smallest ? 0 : static_cast<uint32_t>(unbiased - smallest) << f.mantissa_bits);
  }
  if (code > f.max_code) code = f.max_code;
  if (f.nan_is_minus_zero && code == 0) return 0;
  return static_cast<uint8_t>(sign | code);
}

static inline float f16_to_f32(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ff;
  if (exponent == 31) return bits_float(sign | kF32Inf | mantissa << 13);
  if (exponent == 0) return bits_float(sign | float_bits(static_cast<float>(mantissa) * 0x1p-24f));
  return bits_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

static inline uint16_t f32_to_f16(float x) {
  const uint32_t u = float_bits(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffffu;
  if (magnitude > kF32Inf) return static_cast<uint16_t>(sign | 0x7e00 | (magnitude >> 13 & 0x1ff));
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {  // below 2^-14: the sum's ulp is f16's smallest subnormal, 2^-24
    const float rounded = bits_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (float_bits(rounded) - float_bits(0.5f)));
  }
  return static_cast<uint16_t>(sign | (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

static inline uint16_t f32_to_bf16(float x) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > kF32Inf) return static_cast<uint16_t>(u >> 16 | 0x40);
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static inline float bf16_to_f32(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }

// 2^(code - 127); 0xff is NaN; code 0 is the f32 subnormal 2^-127.
static inline float ue8m0_to_f32(uint8_t code) {
  return code == 0xff ? bits_float(kF32Nan) : code == 0 ? 0x1p-127f : bits_float(static_cast<uint32_t>(code) << 23);
}

}  // namespace moekern
