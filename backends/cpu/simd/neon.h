// The vector vocabulary of AArch64's baseline (Advanced SIMD): 4 floats, 16 bytes. See simd/avx2.h.
#pragma once
#include <arm_neon.h>

#include <cstdint>

namespace moekern::cpu {
namespace {

constexpr int W = 4;
constexpr int kRegisters = 32;
using F32 = float32x4_t;
using I32 = uint32x4_t;

inline I32 bits(F32 x) { return vreinterpretq_u32_f32(x); }
inline F32 as_f32(I32 x) { return vreinterpretq_f32_u32(x); }

inline F32 zero() { return vdupq_n_f32(0.f); }
inline F32 set1(float x) { return vdupq_n_f32(x); }
inline F32 load(const float* p) { return vld1q_f32(p); }
inline F32 load_once(const float* p) { return load(p); }
inline void store(float* p, F32 x) { vst1q_f32(p, x); }
inline F32 fma(F32 a, F32 b, F32 c) { return vfmaq_f32(c, a, b); }
inline F32 mul(F32 a, F32 b) { return vmulq_f32(a, b); }
inline F32 add(F32 a, F32 b) { return vaddq_f32(a, b); }
inline F32 sub(F32 a, F32 b) { return vsubq_f32(a, b); }
inline F32 div(F32 a, F32 b) { return vdivq_f32(a, b); }
// b when either is NaN: FMAX would give the NaN and FMAXNM the number, whichever side it is on.
inline F32 max(F32 a, F32 b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline F32 min(F32 a, F32 b) { return vbslq_f32(vcltq_f32(a, b), a, b); }

inline I32 set1_i32(uint32_t x) { return vdupq_n_u32(x); }
inline uint16x8_t words(I32 x) { return vreinterpretq_u16_u32(x); }
inline I32 from_words(uint16x8_t x) { return vreinterpretq_u32_u16(x); }
inline I32 set1_i16(uint16_t x) { return from_words(vdupq_n_u16(x)); }
inline I32 load_bytes(const uint8_t* p) { return vreinterpretq_u32_u8(vld1q_u8(p)); }
inline I32 load_i32(const void* p) { return load_bytes(static_cast<const uint8_t*>(p)); }
inline void store_i32(void* p, I32 x) { vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_u32(x)); }
// ARM cores notice a stream of stores by themselves.
inline void store_past_caches(void* p, I32 x) { store_i32(p, x); }
inline I32 bit_and(I32 a, I32 b) { return vandq_u32(a, b); }
inline I32 bit_or(I32 a, I32 b) { return vorrq_u32(a, b); }
inline I32 bit_xor(I32 a, I32 b) { return veorq_u32(a, b); }
inline I32 add_i32(I32 a, I32 b) { return vaddq_u32(a, b); }
inline I32 max_i32(I32 a, I32 b) {
  return vreinterpretq_u32_s32(vmaxq_s32(vreinterpretq_s32_u32(a), vreinterpretq_s32_u32(b)));
}
inline I32 min_i32(I32 a, I32 b) {
  return vreinterpretq_u32_s32(vminq_s32(vreinterpretq_s32_u32(a), vreinterpretq_s32_u32(b)));
}
template <int S> inline I32 shl32(I32 x) { return vshlq_n_u32(x, S); }
template <int S> inline I32 shr32(I32 x) { return vshrq_n_u32(x, S); }
template <int S> inline I32 sra32(I32 x) { return vreinterpretq_u32_s32(vshrq_n_s32(vreinterpretq_s32_u32(x), S)); }
template <int S> inline I32 shl16(I32 x) { return vreinterpretq_u32_u16(vshlq_n_u16(vreinterpretq_u16_u32(x), S)); }
template <int S> inline I32 sra16(I32 x) { return vreinterpretq_u32_s16(vshrq_n_s16(vreinterpretq_s16_u32(x), S)); }
template <int S> inline I32 shr16(I32 x) { return from_words(vshrq_n_u16(words(x), S)); }
inline I32 add_i16(I32 a, I32 b) { return from_words(vaddq_u16(words(a), words(b))); }
inline I32 sub_i16(I32 a, I32 b) { return from_words(vsubq_u16(words(a), words(b))); }
inline I32 subs_u16(I32 a, I32 b) { return from_words(vqsubq_u16(words(a), words(b))); }  // 0 where b is larger
inline I32 max_i16(I32 a, I32 b) {
  return vreinterpretq_u32_s16(vmaxq_s16(vreinterpretq_s16_u32(a), vreinterpretq_s16_u32(b)));
}
inline I32 add_i8(I32 a, I32 b) {
  return vreinterpretq_u32_u8(vaddq_u8(vreinterpretq_u8_u32(a), vreinterpretq_u8_u32(b)));
}
inline I32 max_u8(I32 a, I32 b) {
  return vreinterpretq_u32_u8(vmaxq_u8(vreinterpretq_u8_u32(a), vreinterpretq_u8_u32(b)));
}
inline I32 min_s8(I32 a, I32 b) {
  return vreinterpretq_u32_s8(vminq_s8(vreinterpretq_s8_u32(a), vreinterpretq_s8_u32(b)));
}

// W bytes, each in the low 8 bits of a lane.
inline I32 load_u8(const uint8_t* p) {
  uint32_t bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
  return vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(bytes))));
}
// 2W bytes, each in the low 8 bits of a 16-bit word.
inline I32 load_u8_i16(const uint8_t* p) { return from_words(vmovl_u8(vld1_u8(p))); }
inline I32 if_nan(F32 x, I32 then, I32 otherwise) { return vbslq_u32(vceqq_f32(x, x), otherwise, then); }
// One bit a lane, the first lane's lowest.
inline uint32_t equal_lanes(I32 a, I32 b) {
  const uint32_t lane_bits[] = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(vceqq_u32(a, b), vld1q_u32(lane_bits)));
}
inline I32 if_equal(I32 a, I32 b, I32 then, I32 otherwise) { return vbslq_u32(vceqq_u32(a, b), then, otherwise); }

inline F32 load_bf16(const uint16_t* p) { return as_f32(vshll_n_u16(vld1_u16(p), 16)); }
inline F32 load_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline void store_f16(uint16_t* p, F32 x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
// The low 16 bits of every lane, in order.
inline void store_low16(uint16_t* p, I32 x) { vst1_u16(p, vmovn_u32(x)); }

inline F32 bf16_lower(I32 x) { return as_f32(from_words(vzip1q_u16(vdupq_n_u16(0), words(x)))); }
inline F32 bf16_upper(I32 x) { return as_f32(from_words(vzip2q_u16(vdupq_n_u16(0), words(x)))); }
inline I32 even_bytes(I32 a, I32 b) {
  return vreinterpretq_u32_u8(vuzp1q_u8(vreinterpretq_u8_u32(a), vreinterpretq_u8_u32(b)));
}
inline I32 odd_bytes(I32 a, I32 b) {
  return vreinterpretq_u32_u8(vuzp2q_u8(vreinterpretq_u8_u32(a), vreinterpretq_u8_u32(b)));
}
inline I32 narrow_i32(I32 a, I32 b) { return from_words(vuzp1q_u16(words(a), words(b))); }
inline I32 narrow_i16(I32 a, I32 b) { return even_bytes(a, b); }
inline I32 signs_i32(I32 a, I32 b) { return from_words(vuzp2q_u16(words(a), words(b))); }
inline I32 signs_i16(I32 a, I32 b) { return odd_bytes(a, b); }
inline I32 in_order_i32(I32 x) { return x; }
inline I32 in_order_i16(I32 x) { return x; }

inline I32 round_i32(F32 x) { return vreinterpretq_u32_s32(vcvtnq_s32_f32(x)); }  // to nearest even
template <int S> inline I32 fold_halves(I32 x) { return vsraq_n_u32(vshlq_n_u32(x, 8), x, 16 - S); }

// Lane r: the largest of row r, by `max` of two vectors.
template <class Max>
inline I32 reduce_rows(const I32* rows, Max max) {
  const auto merge = [&](I32 a, I32 b) { return max(vzip1q_u32(a, b), vzip2q_u32(a, b)); };
  return merge(merge(rows[0], rows[2]), merge(rows[1], rows[3]));
}

// The largest lane, as a signed integer.
inline uint32_t reduce_max_i32(I32 x) { return static_cast<uint32_t>(vmaxvq_s32(vreinterpretq_s32_u32(x))); }

// (x0 + x1) + (x2 + x3): the same tree for every caller, so a sum has one value.
inline float reduce_add(F32 x) { return vaddvq_f32(x); }

// out[d] lane r = the d-th dword of row r: interleaving the lower with the upper half of the rows,
// log2(4) times, transposes.
inline void transpose_dwords(const uint8_t* const* rows, int64_t offset, I32* out) {
  I32 t[4], u[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) t[r] = load_bytes(rows[r] + offset);
#pragma GCC unroll 2
  for (int r = 0; r < 2; ++r) {
    u[2 * r] = vzip1q_u32(t[r], t[r + 2]);
    u[2 * r + 1] = vzip2q_u32(t[r], t[r + 2]);
  }
#pragma GCC unroll 2
  for (int r = 0; r < 2; ++r) {
    out[2 * r] = vzip1q_u32(u[r], u[r + 2]);
    out[2 * r + 1] = vzip2q_u32(u[r], u[r + 2]);
  }
}

}  // namespace
}  // namespace moekern::cpu
