// The vector vocabulary of AVX-512 F, BW, VL, DQ: 16 floats, 64 bytes. See simd/avx2.h.
#pragma once
#include "cpu/simd/x86.h"

#include <cstdint>

namespace moekern::cpu {
namespace {

constexpr int W = 16;
constexpr int kRegisters = 32;
using F32 = __m512;
using I32 = __m512i;

inline F32 zero() { return _mm512_setzero_ps(); }
inline F32 set1(float x) { return _mm512_set1_ps(x); }
inline F32 load(const float* p) { return _mm512_loadu_ps(p); }
// Read once and kept: compilers repeat a load as a memory operand of every use, and load ports are scarce.
inline F32 load_once(const float* p) {
  F32 x = load(p);
#if !defined(MOEKERN_EMULATE_ISA)
  asm("" : "+v"(x));
#endif
  return x;
}
inline void store(float* p, F32 x) { _mm512_storeu_ps(p, x); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
inline F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
inline F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
inline F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
inline F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
inline F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }  // b when either is NaN
inline F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }

inline I32 set1_i32(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
inline I32 set1_i16(uint16_t x) { return _mm512_set1_epi16(static_cast<short>(x)); }
inline I32 load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline I32 load_i32(const void* p) { return _mm512_loadu_si512(p); }
inline void store_i32(void* p, I32 x) { _mm512_storeu_si512(p, x); }
inline void store_past_caches(void* p, I32 x) { _mm512_stream_si512(static_cast<__m512i*>(p), x); }
inline I32 bits(F32 x) { return _mm512_castps_si512(x); }
inline F32 as_f32(I32 x) { return _mm512_castsi512_ps(x); }
inline I32 bit_and(I32 a, I32 b) { return _mm512_and_si512(a, b); }
inline I32 bit_or(I32 a, I32 b) { return _mm512_or_si512(a, b); }
inline I32 bit_xor(I32 a, I32 b) { return _mm512_xor_si512(a, b); }
inline I32 add_i32(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
inline I32 max_i32(I32 a, I32 b) { return _mm512_max_epi32(a, b); }
inline I32 min_i32(I32 a, I32 b) { return _mm512_min_epi32(a, b); }
template <int S> inline I32 shl32(I32 x) { return _mm512_slli_epi32(x, S); }
template <int S> inline I32 shr32(I32 x) { return _mm512_srli_epi32(x, S); }
template <int S> inline I32 sra32(I32 x) { return _mm512_srai_epi32(x, S); }
template <int S> inline I32 shl16(I32 x) { return _mm512_slli_epi16(x, S); }
template <int S> inline I32 sra16(I32 x) { return _mm512_srai_epi16(x, S); }
template <int S> inline I32 shr16(I32 x) { return _mm512_srli_epi16(x, S); }
inline I32 add_i16(I32 a, I32 b) { return _mm512_add_epi16(a, b); }
inline I32 sub_i16(I32 a, I32 b) { return _mm512_sub_epi16(a, b); }
inline I32 subs_u16(I32 a, I32 b) { return _mm512_subs_epu16(a, b); }  // 0 where b is larger
inline I32 max_i16(I32 a, I32 b) { return _mm512_max_epi16(a, b); }
inline I32 add_i8(I32 a, I32 b) { return _mm512_add_epi8(a, b); }
inline I32 max_u8(I32 a, I32 b) { return _mm512_max_epu8(a, b); }
inline I32 min_s8(I32 a, I32 b) { return _mm512_min_epi8(a, b); }

// W bytes, each in the low 8 bits of a lane.
inline I32 load_u8(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// 2W bytes, each in the low 8 bits of a 16-bit word.
inline I32 load_u8_i16(const uint8_t* p) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline I32 if_nan(F32 x, I32 then, I32 otherwise) {
  return _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), otherwise, then);
}
// One bit a lane, the first lane's lowest.
inline uint32_t equal_lanes(I32 a, I32 b) { return _mm512_cmpeq_epi32_mask(a, b); }
inline I32 if_equal(I32 a, I32 b, I32 then, I32 otherwise) {
  return _mm512_mask_blend_epi32(_mm512_cmpeq_epi32_mask(a, b), otherwise, then);
}

inline F32 load_bf16(const uint16_t* p) {
  return as_f32(shl32<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))));
}
inline F32 load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_f16(uint16_t* p, F32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
// The low 16 bits of every lane, in order.
inline void store_low16(uint16_t* p, I32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x));
}

inline F32 bf16_lower(I32 words) { return as_f32(_mm512_unpacklo_epi16(_mm512_setzero_si512(), words)); }
inline F32 bf16_upper(I32 words) { return as_f32(_mm512_unpackhi_epi16(_mm512_setzero_si512(), words)); }
inline I32 narrow_i32(I32 a, I32 b) { return _mm512_packs_epi32(a, b); }
inline I32 narrow_i16(I32 a, I32 b) { return _mm512_packus_epi16(a, b); }
inline I32 signs_i32(I32 a, I32 b) { return _mm512_packs_epi32(a, b); }
inline I32 signs_i16(I32 a, I32 b) { return _mm512_packs_epi16(a, b); }
inline I32 in_order_i32(I32 x) {
  const I32 order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, x);
}
inline I32 in_order_i16(I32 x) { return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), x); }

inline I32 round_i32(F32 x) { return _mm512_cvtps_epi32(x); }  // to nearest even
template <int S> inline I32 fold_halves(I32 x) { return _mm512_madd_epi16(x, _mm512_set1_epi32(1 << (16 + S) | 256)); }

// Lane r: the largest of row r, by `max` of two vectors.
template <class Max>
inline I32 reduce_rows(const I32* rows, Max max) {
  const auto merge = [&](I32 a, I32 b) { return max(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)); };
  const auto join = [&](I32 a, I32 b) {
    return max(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
  };
  I32 four[4];  // rows 4g .. 4g + 3, in every 128-bit lane
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g, rows += 4) four[g] = merge(merge(rows[0], rows[2]), merge(rows[1], rows[3]));
  return join(join(four[0], four[1]), join(four[2], four[3]));
}

// The largest lane, as a signed integer.
inline uint32_t reduce_max_i32(I32 x) {
  const __m256i h = _mm256_max_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
}

inline __m256 upper(F32 x) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)); }
// Halves, then halves again: the same tree for every caller, so a sum has one value.
inline float reduce_add(F32 x) {
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(x), upper(x));
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// out[d] lane r = the d-th dword of row r: a 16 x 16 transposition of dwords, 64 shuffles.
inline void transpose_dwords(const uint8_t* const* rows, int64_t offset, I32* out) {
  I32 t[16], u[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) t[r] = load_bytes(rows[r] + offset);
#pragma GCC unroll 8
  for (int r = 0; r < 16; r += 2) {
    u[r] = _mm512_unpacklo_epi32(t[r], t[r + 1]);
    u[r + 1] = _mm512_unpackhi_epi32(t[r], t[r + 1]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 16; r += 4) {
    t[r] = _mm512_unpacklo_epi64(u[r], u[r + 2]);
    t[r + 1] = _mm512_unpackhi_epi64(u[r], u[r + 2]);
    t[r + 2] = _mm512_unpacklo_epi64(u[r + 1], u[r + 3]);
    t[r + 3] = _mm512_unpackhi_epi64(u[r + 1], u[r + 3]);
  }
  // t[4g + d] holds, in its 128-bit lane l, dword 4l + d of the rows 4g .. 4g + 3.
#pragma GCC unroll 4
  for (int d = 0; d < 4; ++d) {
    const I32 a = _mm512_shuffle_i32x4(t[d], t[4 + d], 0x88), b = _mm512_shuffle_i32x4(t[8 + d], t[12 + d], 0x88);
    const I32 c = _mm512_shuffle_i32x4(t[d], t[4 + d], 0xdd), e = _mm512_shuffle_i32x4(t[8 + d], t[12 + d], 0xdd);
    out[d] = _mm512_shuffle_i32x4(a, b, 0x88);
    out[8 + d] = _mm512_shuffle_i32x4(a, b, 0xdd);
    out[4 + d] = _mm512_shuffle_i32x4(c, e, 0x88);
    out[12 + d] = _mm512_shuffle_i32x4(c, e, 0xdd);
  }
}

}  // namespace
}  // namespace moekern::cpu
