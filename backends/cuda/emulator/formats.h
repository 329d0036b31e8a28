// The floating point formats that PTX knows, as bits, and rounding into them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace moekern::emulator {

enum class Rounding : uint8_t { nearest, zero, down, up, nearest_away };

// No format is wider than 32 bits; x + 1 is what a format of more bits than e5m2 calls infinity.
struct Format {
  int exponent_bits, mantissa_bits;
  bool infinity;      // e4m3 has none: its largest exponent holds numbers
  uint32_t max_bits;  // the largest finite number
  uint32_t nan_bits;  // what NaN becomes
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int bits() const { return 1 + exponent_bits + mantissa_bits; }
};

constexpr Format kF16{5, 10, true, 0x7bff, 0x7fff}, kBf16{8, 7, true, 0x7f7f, 0x7fff}, kE4m3{4, 3, false, 0x7e, 0x7f},
    kE5m2{5, 2, true, 0x7b, 0x7f}, kTf32{8, 10, true, 0x3fbff, 0x3ffff}, kF32{8, 23, true, 0x7f7fffff, 0x7fffffff};

// `saturate`: what is too large, infinity included, becomes the largest finite number. NaN stays NaN.
uint32_t encode(double x, const Format& format, Rounding rounding = Rounding::nearest, bool saturate = false);
double decode(uint32_t bits, const Format& format);

inline float as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t as_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}
inline double as_double(uint64_t bits) {
  double d;
  std::memcpy(&d, &bits, 8);
  return d;
}
inline uint64_t as_bits(double d) {
  uint64_t bits;
  std::memcpy(&bits, &d, 8);
  return bits;
}

constexpr uint32_t kNan32 = 0x7fffffff;
inline uint32_t canonical(float f) { return f != f ? kNan32 : as_bits(f); }
inline uint64_t canonical(double d) { return d != d ? 0x7fffffffffffffffull : as_bits(d); }
inline float flush(float f) { return std::fabs(f) < 0x1p-126f ? std::copysign(0.f, f) : f; }

inline float from_bf16(uint32_t bits) { return as_float(bits << 16); }
inline uint32_t to_bf16(float f) {  // to nearest even
  const uint32_t bits = as_bits(f);
  if (f != f) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
float from_f16(uint32_t bits);
uint32_t to_f16(float f);

// a * b + c rounded once, and to odd: rounding it again to a narrower format is then right.
double fma_to_odd(double a, double b, double c);

}  // namespace moekern::emulator
