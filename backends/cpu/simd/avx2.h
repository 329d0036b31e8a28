// The vector vocabulary of AVX2 + FMA + F16C: 8 floats, 32 bytes.
//
// Every simd/*.h defines the same names in an unnamed namespace, so the templates written against
// them (gemm/tile.h, gemm/stream.h, rows.h) become different functions in each ISA's object and
// the linker can never keep one ISA's copy for another (-mavx512f code on an AVX2 machine).
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace moekern::cpu {
namespace {

constexpr int W = 8;
constexpr int kRegisters = 16;
using F32 = __m256;
using I32 = __m256i;

inline F32 zero() { return _mm256_setzero_ps(); }
inline F32 set1(float x) { return _mm256_set1_ps(x); }
inline F32 load(const float* p) { return _mm256_loadu_ps(p); }
// Read once and kept: compilers repeat a load as a memory operand of every use, and load ports are scarce.
inline F32 load_once(const float* p) {
  F32 x = load(p);
  asm("" : "+x"(x));
  return x;
}
inline void store(float* p, F32 x) { _mm256_storeu_ps(p, x); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
inline F32 mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
inline F32 add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
inline F32 sub(F32 a, F32 b) { return _mm256_sub_ps(a, b); }
inline F32 div(F32 a, F32 b) { return _mm256_div_ps(a, b); }
inline F32 max(F32 a, F32 b) { return _mm256_max_ps(a, b); }  // b when either is NaN
inline F32 min(F32 a, F32 b) { return _mm256_min_ps(a, b); }

inline I32 set1_i32(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
inline I32 set1_i16(uint16_t x) { return _mm256_set1_epi16(static_cast<short>(x)); }
inline I32 load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline I32 load_i32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_i32(void* p, I32 x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
// Past the caches, where an instruction says so: a plain store first reads the line it writes to.
inline void store_past_caches(void* p, I32 x) { _mm256_stream_si256(static_cast<__m256i*>(p), x); }
inline I32 bits(F32 x) { return _mm256_castps_si256(x); }
inline F32 as_f32(I32 x) { return _mm256_castsi256_ps(x); }
inline I32 bit_and(I32 a, I32 b) { return _mm256_and_si256(a, b); }
inline I32 bit_or(I32 a, I32 b) { return _mm256_or_si256(a, b); }
inline I32 bit_xor(I32 a, I32 b) { return _mm256_xor_si256(a, b); }
inline I32 add_i32(I32 a, I32 b) { return _mm256_add_epi32(a, b); }
inline I32 max_i32(I32 a, I32 b) { return _mm256_max_epi32(a, b); }
inline I32 min_i32(I32 a, I32 b) { return _mm256_min_epi32(a, b); }
template <int S> inline I32 shl32(I32 x) { return _mm256_slli_epi32(x, S); }
template <int S> inline I32 shr32(I32 x) { return _mm256_srli_epi32(x, S); }
template <int S> inline I32 sra32(I32 x) { return _mm256_srai_epi32(x, S); }
template <int S> inline I32 shl16(I32 x) { return _mm256_slli_epi16(x, S); }
template <int S> inline I32 sra16(I32 x) { return _mm256_srai_epi16(x, S); }
template <int S> inline I32 shr16(I32 x) { return _mm256_srli_epi16(x, S); }
inline I32 add_i16(I32 a, I32 b) { return _mm256_add_epi16(a, b); }
inline I32 sub_i16(I32 a, I32 b) { return _mm256_sub_epi16(a, b); }
inline I32 subs_u16(I32 a, I32 b) { return _mm256_subs_epu16(a, b); }  // 0 where b is larger
inline I32 max_i16(I32 a, I32 b) { return _mm256_max_epi16(a, b); }
inline I32 add_i8(I32 a, I32 b) { return _mm256_add_epi8(a, b); }
inline I32 max_u8(I32 a, I32 b) { return _mm256_max_epu8(a, b); }
inline I32 min_s8(I32 a, I32 b) { return _mm256_min_epi8(a, b); }

// W bytes, each in the low 8 bits of a lane.
inline I32 load_u8(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
// 2W bytes, each in the low 8 bits of a 16-bit word.
inline I32 load_u8_i16(const uint8_t* p) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline I32 if_nan(F32 x, I32 then, I32 otherwise) {
  return _mm256_blendv_epi8(otherwise, then, bits(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
// One bit a lane, the first lane's lowest.
inline uint32_t equal_lanes(I32 a, I32 b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b))));
}
inline I32 if_equal(I32 a, I32 b, I32 then, I32 otherwise) {
  return _mm256_blendv_epi8(otherwise, then, _mm256_cmpeq_epi32(a, b));
}

inline F32 load_bf16(const uint16_t* p) {
  return as_f32(shl32<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
}
inline F32 load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store_f16(uint16_t* p, F32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
// The low 16 bits of every lane, in order.
inline void store_low16(uint16_t* p, I32 x) {
  const I32 packed = _mm256_packus_epi32(x, x);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}

// Narrowing works within 128-bit lanes on some ISAs, so its results have an order of their own. It is
// undone at the end: by in_order_i32 where the first vectors narrowed were lanes in order, by in_order_i16
// where they were 16-bit words in order. bf16_lower and bf16_upper split words so that narrow_i32 of the
// two gives the words' own order.
inline F32 bf16_lower(I32 words) { return as_f32(_mm256_unpacklo_epi16(_mm256_setzero_si256(), words)); }
inline F32 bf16_upper(I32 words) { return as_f32(_mm256_unpackhi_epi16(_mm256_setzero_si256(), words)); }
inline I32 narrow_i32(I32 a, I32 b) { return _mm256_packs_epi32(a, b); }   // lanes within 16 bits, signed
inline I32 narrow_i16(I32 a, I32 b) { return _mm256_packus_epi16(a, b); }  // words within 8 bits, unsigned
// Words, or bytes, with the sign bits of a's and b's lanes, or words; their other bits are anything.
inline I32 signs_i32(I32 a, I32 b) { return _mm256_packs_epi32(a, b); }
inline I32 signs_i16(I32 a, I32 b) { return _mm256_packs_epi16(a, b); }
inline I32 in_order_i32(I32 x) { return _mm256_permutevar8x32_epi32(x, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)); }
inline I32 in_order_i16(I32 x) { return _mm256_permute4x64_epi64(x, 0xd8); }

inline I32 round_i32(F32 x) { return _mm256_cvtps_epi32(x); }  // to nearest even
// (low << 8) + (high << S) of every lane's signed halves: exact below 2^15, otherwise right in bits 8 .. 15.
template <int S> inline I32 fold_halves(I32 x) { return _mm256_madd_epi16(x, _mm256_set1_epi32(1 << (16 + S) | 256)); }

// Lane r: the largest of row r, by `max` of two vectors.
template <class Max>
inline I32 reduce_rows(const I32* rows, Max max) {
  const auto merge = [&](I32 a, I32 b) { return max(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b)); };
  const I32 lower = merge(merge(rows[0], rows[2]), merge(rows[1], rows[3]));
  const I32 upper = merge(merge(rows[4], rows[6]), merge(rows[5], rows[7]));
  return max(_mm256_permute2x128_si256(lower, upper, 0x20), _mm256_permute2x128_si256(lower, upper, 0x31));
}

// The largest lane, as a signed integer.
inline uint32_t reduce_max_i32(I32 x) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
}

// x0 + x4, x1 + x5, ... pairwise: the same tree for every caller, so a sum has one value.
inline float reduce_add(F32 x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// out[d] lane r = the d-th dword of row r: an 8 x 8 transposition of dwords, 24 shuffles.
inline void transpose_dwords(const uint8_t* const* rows, int64_t offset, I32* out) {
  I32 t[8], u[8];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) t[r] = load_bytes(rows[r] + offset);
#pragma GCC unroll 4
  for (int r = 0; r < 8; r += 2) {
    u[r] = _mm256_unpacklo_epi32(t[r], t[r + 1]);
    u[r + 1] = _mm256_unpackhi_epi32(t[r], t[r + 1]);
  }
#pragma GCC unroll 2
  for (int r = 0; r < 8; r += 4) {
    t[r] = _mm256_unpacklo_epi64(u[r], u[r + 2]);
    t[r + 1] = _mm256_unpackhi_epi64(u[r], u[r + 2]);
    t[r + 2] = _mm256_unpacklo_epi64(u[r + 1], u[r + 3]);
    t[r + 3] = _mm256_unpackhi_epi64(u[r + 1], u[r + 3]);
  }
#pragma GCC unroll 4
  for (int d = 0; d < 4; ++d) {
    out[d] = _mm256_permute2x128_si256(t[d], t[d + 4], 0x20);
    out[d + 4] = _mm256_permute2x128_si256(t[d], t[d + 4], 0x31);
  }
}

}  // namespace
}  // namespace moekern::cpu
