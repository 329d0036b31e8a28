#include "formats.h"

namespace moekern::emulator {

uint32_t encode(double x, const Format& f, Rounding rounding, bool saturate) {
  const uint32_t sign = std::signbit(x) ? 1u << (f.bits() - 1) : 0;
  if (x != x) return f.nan_bits;
  const uint32_t infinity = f.infinity ? f.max_bits + 1 : f.nan_bits;
  if (std::isinf(x)) return sign | (saturate ? f.max_bits : infinity);
  const double magnitude = std::fabs(x);
  if (magnitude == 0) return sign;
  int exponent;
  std::frexp(magnitude, &exponent);  // magnitude in [2^(exponent-1), 2^exponent)
  // The value of a unit in the last place; below the smallest normal number it no longer shrinks.
  const int lowest = 1 - f.bias() - f.mantissa_bits;
  const int unit = exponent - 1 - f.mantissa_bits > lowest ? exponent - 1 - f.mantissa_bits : lowest;
  const double scaled = std::ldexp(magnitude, -unit);
  double whole = std::floor(scaled);
  const double rest = scaled - whole;
  switch (rounding) {
    case Rounding::nearest:
      if (rest > 0.5 || (rest == 0.5 && std::fmod(whole, 2) != 0)) whole += 1;
      break;
    case Rounding::nearest_away:
      if (rest >= 0.5) whole += 1;
      break;
    case Rounding::zero: break;
    case Rounding::down:
      if (rest > 0 && sign) whole += 1;
      break;
    case Rounding::up:
      if (rest > 0 && !sign) whole += 1;
      break;
  }
  // Codes of consecutive numbers are consecutive, so a carry out of the mantissa needs no care.
  const auto steps = static_cast<uint64_t>(whole);
  const uint64_t code = steps + (static_cast<uint64_t>(unit - lowest) << f.mantissa_bits);
  if (code > f.max_bits) {
    const bool towards_zero =
        rounding == Rounding::zero || (rounding == Rounding::down && !sign) || (rounding == Rounding::up && sign);
    return sign | (saturate || towards_zero ? f.max_bits : infinity);
  }
  return sign | static_cast<uint32_t>(code);
}

double decode(uint32_t bits, const Format& f) {
  const bool negative = bits >> (f.bits() - 1) & 1;
  const uint32_t code = bits & ((1u << (f.bits() - 1)) - 1);
  double x;
  if (code > f.max_bits) {
    x = f.infinity && code == f.max_bits + 1 ? HUGE_VAL : std::nan("");
  } else {
    const uint32_t exponent = code >> f.mantissa_bits, mantissa = code & ((1u << f.mantissa_bits) - 1);
    x = exponent ? std::ldexp(static_cast<double>(mantissa | 1u << f.mantissa_bits),
                              static_cast<int>(exponent) - f.bias() - f.mantissa_bits)
                 : std::ldexp(static_cast<double>(mantissa), 1 - f.bias() - f.mantissa_bits);
  }
  return negative ? -x : x;
}

float from_f16(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000) << 16, code = bits & 0x7fff;
  if (code >= 0x7c00) return as_float(sign | 0x7f800000 | (code & 0x3ff) << 13);
  // The exponent's bias is off by 112, which a product mends for subnormal numbers too.
  return as_float(sign | as_bits(as_float(code << 13) * 0x1p112f));
}

uint32_t to_f16(float f) {
  const uint32_t sign = as_bits(f) >> 16 & 0x8000, magnitude = as_bits(f) & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and more
  if (magnitude < 0x38800000) {                       // below 2^-14: the sum's last place is 2^-24
    const float rounded = as_float(magnitude) + 0.5f;
    return sign | (as_bits(rounded) - as_bits(0.5f));
  }
  return sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

double fma_to_odd(double a, double b, double c) {
  const double s = std::fma(a, b, c);
  if (!std::isfinite(s)) return s;
  const double product = a * b;  // exact: no operand has more than 26 bits
  const double part = s - product, error = (product - (s - part)) + (c - part);
  if (error == 0 || (as_bits(s) & 1)) return s;
  const bool away = (error > 0) == (s > 0);
  return as_double(as_bits(s) + (away ? 1 : -1));
}

}  // namespace moekern::emulator
