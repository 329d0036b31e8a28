// The vector vocabulary in plain C++, one float wide: what runs everywhere, and the baseline that
// the other ISAs are compared with. See simd/avx2.h.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "moekern/float_formats.h"

namespace moekern::cpu {
namespace {

constexpr int W = 1;
constexpr int kRegisters = 16;
using F32 = float;
using I32 = uint32_t;

inline I32 bits(F32 x) { return float_bits(x); }
inline F32 as_f32(I32 x) { return bits_float(x); }

inline F32 zero() { return 0.f; }
inline F32 set1(float x) { return x; }
inline F32 load(const float* p) { return *p; }
inline F32 load_once(const float* p) { return load(p); }
inline void store(float* p, F32 x) { *p = x; }
inline F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
inline F32 mul(F32 a, F32 b) { return a * b; }
inline F32 add(F32 a, F32 b) { return a + b; }
inline F32 sub(F32 a, F32 b) { return a - b; }
inline F32 div(F32 a, F32 b) { return a / b; }
inline F32 max(F32 a, F32 b) { return a > b ? a : b; }  // b when either is NaN
inline F32 min(F32 a, F32 b) { return a < b ? a : b; }

inline I32 set1_i32(uint32_t x) { return x; }
inline I32 set1_i16(uint16_t x) { return x * 0x00010001u; }
inline I32 load_i32(const void* p) {
  I32 x;
  std::memcpy(&x, p, 4);
  return x;
}
inline I32 load_bytes(const uint8_t* p) { return load_i32(p); }
inline void store_i32(void* p, I32 x) { std::memcpy(p, &x, 4); }
inline void store_past_caches(void* p, I32 x) { store_i32(p, x); }
inline I32 bit_and(I32 a, I32 b) { return a & b; }
inline I32 bit_or(I32 a, I32 b) { return a | b; }
inline I32 bit_xor(I32 a, I32 b) { return a ^ b; }
inline I32 add_i32(I32 a, I32 b) { return a + b; }
inline I32 max_i32(I32 a, I32 b) { return static_cast<int32_t>(a) > static_cast<int32_t>(b) ? a : b; }
inline I32 min_i32(I32 a, I32 b) { return static_cast<int32_t>(a) < static_cast<int32_t>(b) ? a : b; }
template <int S> inline I32 shl32(I32 x) { return x << S; }
template <int S> inline I32 shr32(I32 x) { return x >> S; }
template <int S> inline I32 sra32(I32 x) { return static_cast<I32>(static_cast<int32_t>(x) >> S); }
template <int S> inline I32 shl16(I32 x) { return (x << S) & (0x00010001u * (0xffffu & (0xffffu << S))); }
template <int S> inline I32 sra16(I32 x) {
  const uint32_t lo = static_cast<uint16_t>(static_cast<int16_t>(x) >> S);
  const uint32_t hi = static_cast<uint16_t>(static_cast<int16_t>(x >> 16) >> S);
  return lo | hi << 16;
}

template <int S> inline I32 shr16(I32 x) { return (x >> S) & (0x00010001u * (0xffffu >> S)); }

template <class T, class Pick>
inline I32 each_word(I32 a, I32 b, Pick pick) {
  const auto low = static_cast<uint16_t>(pick(static_cast<T>(a), static_cast<T>(b)));
  const auto high = static_cast<uint16_t>(pick(static_cast<T>(a >> 16), static_cast<T>(b >> 16)));
  return low | static_cast<I32>(high) << 16;
}
inline I32 add_i16(I32 a, I32 b) {
  return each_word<uint16_t>(a, b, [](int x, int y) { return x + y; });
}
inline I32 sub_i16(I32 a, I32 b) {
  return each_word<uint16_t>(a, b, [](int x, int y) { return x - y; });
}
inline I32 subs_u16(I32 a, I32 b) {  // 0 where b is larger
  return each_word<uint16_t>(a, b, [](int x, int y) { return x > y ? x - y : 0; });
}
inline I32 max_i16(I32 a, I32 b) {
  return each_word<int16_t>(a, b, [](int x, int y) { return x > y ? x : y; });
}

template <class T, class Pick>
inline I32 each_byte(I32 a, I32 b, Pick pick) {
  I32 out = 0;
  for (int i = 0; i < 32; i += 8)
    out |= static_cast<I32>(static_cast<uint8_t>(pick(static_cast<T>(a >> i), static_cast<T>(b >> i)))) << i;
  return out;
}
inline I32 add_i8(I32 a, I32 b) {
  return each_byte<uint8_t>(a, b, [](int x, int y) { return x + y; });
}
inline I32 max_u8(I32 a, I32 b) {
  return each_byte<uint8_t>(a, b, [](int x, int y) { return x > y ? x : y; });
}
inline I32 min_s8(I32 a, I32 b) {
  return each_byte<int8_t>(a, b, [](int x, int y) { return x < y ? x : y; });
}

// W bytes, each in the low 8 bits of a lane.
inline I32 load_u8(const uint8_t* p) { return *p; }
// 2W bytes, each in the low 8 bits of a 16-bit word.
inline I32 load_u8_i16(const uint8_t* p) { return p[0] | static_cast<I32>(p[1]) << 16; }
inline I32 if_nan(F32 x, I32 then, I32 otherwise) { return x != x ? then : otherwise; }
// One bit a lane, the first lane's lowest.
inline uint32_t equal_lanes(I32 a, I32 b) { return a == b; }
inline I32 if_equal(I32 a, I32 b, I32 then, I32 otherwise) { return a == b ? then : otherwise; }

template <class Max> inline I32 reduce_rows(const I32* rows, Max) { return rows[0]; }

inline F32 load_bf16(const uint16_t* p) { return as_f32(static_cast<uint32_t>(*p) << 16); }
inline F32 load_f16(const uint16_t* p) { return f16_to_f32(*p); }
inline void store_f16(uint16_t* p, F32 x) { *p = f32_to_f16(x); }
inline void store_low16(uint16_t* p, I32 x) { *p = static_cast<uint16_t>(x); }

inline F32 bf16_lower(I32 words) { return as_f32(words << 16); }
inline F32 bf16_upper(I32 words) { return as_f32(words & 0xffff0000u); }
inline I32 narrow_i32(I32 a, I32 b) { return (a & 0xffff) | b << 16; }
inline I32 narrow_i16(I32 a, I32 b) {
  return (a & 0xff) | (a >> 8 & 0xff00) | (b & 0xff) << 16 | (b << 8 & 0xff000000u);
}
inline I32 signs_i32(I32 a, I32 b) { return a >> 16 | (b & 0xffff0000u); }
inline I32 signs_i16(I32 a, I32 b) { return narrow_i16(shr16<8>(a), shr16<8>(b)); }
inline I32 in_order_i32(I32 x) { return x; }
inline I32 in_order_i16(I32 x) { return x; }

// To nearest even, |x| < 2^22: where f32's ulp is 1 its own rounding acts, and the low bits are the integer.
inline I32 round_i32(F32 x) { return bits(x + 0x1.8p23f) - bits(0x1.8p23f); }
template <int S> inline I32 fold_halves(I32 x) { return (x << 8) + (x >> 16 << S); }

inline uint32_t reduce_max_i32(I32 x) { return x; }

inline float reduce_add(F32 x) { return x; }
inline void transpose_dwords(const uint8_t* const* rows, int64_t offset, I32* out) {
  out[0] = load_bytes(rows[0] + offset);
}

}  // namespace
}  // namespace moekern::cpu
