// The vector vocabulary of SVE with vectors of 256 bits, fixed when compiling (the object's flags
// say so, feature::sve_256 checks it): 8 floats, 32 bytes. See simd/avx2.h.
#pragma once
#include <arm_sve.h>

#include <cstdint>

namespace moekern::cpu {
namespace {

constexpr int W = 8;
constexpr int kRegisters = 32;
typedef svfloat32_t F32 __attribute__((arm_sve_vector_bits(256)));
typedef svuint32_t I32 __attribute__((arm_sve_vector_bits(256)));

inline svbool_t all() { return svptrue_b8(); }
inline I32 bits(F32 x) { return svreinterpret_u32_f32(x); }
inline F32 as_f32(I32 x) { return svreinterpret_f32_u32(x); }

inline F32 zero() { return svdup_n_f32(0.f); }
inline F32 set1(float x) { return svdup_n_f32(x); }
inline F32 load(const float* p) { return svld1_f32(all(), p); }
inline F32 load_once(const float* p) { return load(p); }
inline void store(float* p, F32 x) { svst1_f32(all(), p, x); }
inline F32 fma(F32 a, F32 b, F32 c) { return svmla_f32_x(all(), c, a, b); }
inline F32 mul(F32 a, F32 b) { return svmul_f32_x(all(), a, b); }
inline F32 add(F32 a, F32 b) { return svadd_f32_x(all(), a, b); }
inline F32 sub(F32 a, F32 b) { return svsub_f32_x(all(), a, b); }
inline F32 div(F32 a, F32 b) { return svdiv_f32_x(all(), a, b); }
inline F32 max(F32 a, F32 b) { return svsel_f32(svcmpgt_f32(all(), a, b), a, b); }  // b when either is NaN
inline F32 min(F32 a, F32 b) { return svsel_f32(svcmplt_f32(all(), a, b), a, b); }

inline I32 set1_i32(uint32_t x) { return svdup_n_u32(x); }
inline svuint16_t words(I32 x) { return svreinterpret_u16_u32(x); }
inline I32 from_words(svuint16_t x) { return svreinterpret_u32_u16(x); }
inline I32 set1_i16(uint16_t x) { return from_words(svdup_n_u16(x)); }
inline I32 load_bytes(const uint8_t* p) { return svreinterpret_u32_u8(svld1_u8(all(), p)); }
inline I32 load_i32(const void* p) { return load_bytes(static_cast<const uint8_t*>(p)); }
inline void store_i32(void* p, I32 x) { svst1_u8(all(), static_cast<uint8_t*>(p), svreinterpret_u8_u32(x)); }
// ARM cores notice a stream of stores by themselves.
inline void store_past_caches(void* p, I32 x) { store_i32(p, x); }
inline I32 bit_and(I32 a, I32 b) { return svand_u32_x(all(), a, b); }
inline I32 bit_or(I32 a, I32 b) { return svorr_u32_x(all(), a, b); }
inline I32 bit_xor(I32 a, I32 b) { return sveor_u32_x(all(), a, b); }
inline I32 add_i32(I32 a, I32 b) { return svadd_u32_x(all(), a, b); }
inline I32 max_i32(I32 a, I32 b) {
  return svreinterpret_u32_s32(svmax_s32_x(all(), svreinterpret_s32_u32(a), svreinterpret_s32_u32(b)));
}
inline I32 min_i32(I32 a, I32 b) {
  return svreinterpret_u32_s32(svmin_s32_x(all(), svreinterpret_s32_u32(a), svreinterpret_s32_u32(b)));
}
template <int S> inline I32 shl32(I32 x) { return svlsl_n_u32_x(all(), x, S); }
template <int S> inline I32 shr32(I32 x) { return svlsr_n_u32_x(all(), x, S); }
template <int S> inline I32 sra32(I32 x) {
  return svreinterpret_u32_s32(svasr_n_s32_x(all(), svreinterpret_s32_u32(x), S));
}
template <int S> inline I32 shl16(I32 x) {
  return svreinterpret_u32_u16(svlsl_n_u16_x(all(), svreinterpret_u16_u32(x), S));
}
template <int S> inline I32 sra16(I32 x) {
  return svreinterpret_u32_s16(svasr_n_s16_x(all(), svreinterpret_s16_u32(x), S));
}
template <int S> inline I32 shr16(I32 x) { return from_words(svlsr_n_u16_x(all(), words(x), S)); }
inline I32 add_i16(I32 a, I32 b) { return from_words(svadd_u16_x(all(), words(a), words(b))); }
inline I32 sub_i16(I32 a, I32 b) { return from_words(svsub_u16_x(all(), words(a), words(b))); }
inline I32 subs_u16(I32 a, I32 b) { return from_words(svqsub_u16(words(a), words(b))); }  // 0 where b is larger
inline I32 max_i16(I32 a, I32 b) {
  return svreinterpret_u32_s16(svmax_s16_x(all(), svreinterpret_s16_u32(a), svreinterpret_s16_u32(b)));
}
inline I32 add_i8(I32 a, I32 b) {
  return svreinterpret_u32_u8(svadd_u8_x(all(), svreinterpret_u8_u32(a), svreinterpret_u8_u32(b)));
}
inline I32 max_u8(I32 a, I32 b) {
  return svreinterpret_u32_u8(svmax_u8_x(all(), svreinterpret_u8_u32(a), svreinterpret_u8_u32(b)));
}
inline I32 min_s8(I32 a, I32 b) {
  return svreinterpret_u32_s8(svmin_s8_x(all(), svreinterpret_s8_u32(a), svreinterpret_s8_u32(b)));
}

// W bytes, each in the low 8 bits of a lane.
inline I32 load_u8(const uint8_t* p) { return svld1ub_u32(all(), p); }
// 2W bytes, each in the low 8 bits of a 16-bit word.
inline I32 load_u8_i16(const uint8_t* p) { return from_words(svld1ub_u16(all(), p)); }
inline I32 if_nan(F32 x, I32 then, I32 otherwise) { return svsel_u32(svcmpuo_f32(all(), x, x), then, otherwise); }
// One bit a lane, the first lane's lowest.
inline uint32_t equal_lanes(I32 a, I32 b) {
  const I32 lane_bits = svlsl_u32_x(all(), svdup_n_u32(1), svindex_u32(0, 1));
  return svorv_u32(svcmpeq_u32(all(), a, b), lane_bits);
}
inline I32 if_equal(I32 a, I32 b, I32 then, I32 otherwise) {
  return svsel_u32(svcmpeq_u32(all(), a, b), then, otherwise);
}

// Loads that widen to 32 bits and stores that narrow do the conversions' shuffling; FCVT reads and
// writes f16 in the low half of each lane.
inline F32 load_bf16(const uint16_t* p) { return as_f32(shl32<16>(svld1uh_u32(all(), p))); }
inline F32 load_f16(const uint16_t* p) { return svcvt_f32_f16_x(all(), svreinterpret_f16_u32(svld1uh_u32(all(), p))); }
inline void store_low16(uint16_t* p, I32 x) { svst1h_u32(all(), p, x); }
inline void store_f16(uint16_t* p, F32 x) { store_low16(p, svreinterpret_u32_f16(svcvt_f16_f32_x(all(), x))); }

inline F32 bf16_lower(I32 x) { return as_f32(from_words(svzip1_u16(svdup_n_u16(0), words(x)))); }
inline F32 bf16_upper(I32 x) { return as_f32(from_words(svzip2_u16(svdup_n_u16(0), words(x)))); }
inline I32 even_bytes(I32 a, I32 b) {
  return svreinterpret_u32_u8(svuzp1_u8(svreinterpret_u8_u32(a), svreinterpret_u8_u32(b)));
}
inline I32 odd_bytes(I32 a, I32 b) {
  return svreinterpret_u32_u8(svuzp2_u8(svreinterpret_u8_u32(a), svreinterpret_u8_u32(b)));
}
inline I32 narrow_i32(I32 a, I32 b) { return from_words(svuzp1_u16(words(a), words(b))); }
inline I32 narrow_i16(I32 a, I32 b) { return even_bytes(a, b); }
inline I32 signs_i32(I32 a, I32 b) { return from_words(svuzp2_u16(words(a), words(b))); }
inline I32 signs_i16(I32 a, I32 b) { return odd_bytes(a, b); }
inline I32 in_order_i32(I32 x) { return x; }
inline I32 in_order_i16(I32 x) { return x; }

inline I32 round_i32(F32 x) {  // to nearest even
  return svreinterpret_u32_s32(svcvt_s32_f32_x(all(), svrintn_f32_x(all(), x)));
}
template <int S> inline I32 fold_halves(I32 x) { return add_i32(shl32<8>(x), shr32<16 - S>(x)); }

// Lane r: the largest of row r, by `max` of two vectors.
template <class Max>
inline I32 reduce_rows(const I32* rows, Max max) {
  const auto merge = [&](I32 a, I32 b) { return max(svzip1_u32(a, b), svzip2_u32(a, b)); };
  const I32 even = merge(merge(rows[0], rows[4]), merge(rows[2], rows[6]));
  const I32 odd = merge(merge(rows[1], rows[5]), merge(rows[3], rows[7]));
  return merge(even, odd);
}

// The largest lane, as a signed integer.
inline uint32_t reduce_max_i32(I32 x) { return static_cast<uint32_t>(svmaxv_s32(all(), svreinterpret_s32_u32(x))); }

// FADDV adds pairwise, in halves: the same tree for every caller, so a sum has one value.
inline float reduce_add(F32 x) { return svaddv_f32(all(), x); }

// out[d] lane r = the d-th dword of row r: interleaving the lower with the upper half of the rows,
// log2(8) times, transposes.
inline void transpose_dwords(const uint8_t* const* rows, int64_t offset, I32* out) {
  I32 t[8], u[8];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) t[r] = load_bytes(rows[r] + offset);
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    u[2 * r] = svzip1_u32(t[r], t[r + 4]);
    u[2 * r + 1] = svzip2_u32(t[r], t[r + 4]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    t[2 * r] = svzip1_u32(u[r], u[r + 4]);
    t[2 * r + 1] = svzip2_u32(u[r], u[r + 4]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    out[2 * r] = svzip1_u32(t[r], t[r + 4]);
    out[2 * r + 1] = svzip2_u32(t[r], t[r + 4]);
  }
}

}  // namespace
}  // namespace moekern::cpu
