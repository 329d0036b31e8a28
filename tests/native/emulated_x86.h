// AVX-512 on an AVX2 machine: <immintrin.h>'s names from SIMDe, and what SIMDe 0.7.4 lacks or
// rounds otherwise than the instruction does, from the descriptions in Intel's manual.
#pragma once
#include <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include "emulated_amx.h"
#include "emulated_bf16.h"

namespace moekern::emulated {

static inline __m256i half(__m512i x, int which) { return simde__m512i_to_private(x).m256i[which]; }

static inline __m512i join(__m256i low, __m256i high) {
  simde__m512i_private r;
  r.m256i[0] = low;
  r.m256i[1] = high;
  return simde__m512i_from_private(r);
}

static inline __m512i cvtepu16_epi32(__m256i x) {
  return join(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1)));
}

static inline __m512i cvtepu8_epi16(__m256i x) {
  return join(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(x)), _mm256_cvtepu8_epi16(_mm256_extracti128_si256(x, 1)));
}

static inline __m512i cvtepu8_epi32(__m128i x) {
  return join(_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8)));
}

static inline __m256i cvtepi32_epi16(__m512i x) {
  const __m256i low16 = _mm256_set1_epi32(0xffff);
  const __m256i packed = _mm256_packus_epi32(_mm256_and_si256(half(x, 0), low16), _mm256_and_si256(half(x, 1), low16));
  return _mm256_permute4x64_epi64(packed, 0xd8);
}

static inline __m512i srai_epi32(__m512i x, unsigned bits) {
  const int count = static_cast<int>(bits);
  return join(_mm256_srai_epi32(half(x, 0), count), _mm256_srai_epi32(half(x, 1), count));
}

static inline __m512i madd_epi16(__m512i x, __m512i y) {
  return join(_mm256_madd_epi16(half(x, 0), half(y, 0)), _mm256_madd_epi16(half(x, 1), half(y, 1)));
}

static inline __m512i cvtps_epi32(__m512 x) {
  const simde__m512_private v = simde__m512_to_private(x);
  return join(_mm256_cvtps_epi32(v.m256[0]), _mm256_cvtps_epi32(v.m256[1]));
}

static inline void stream_si512(void* p, __m512i x) {
  auto* halves = static_cast<__m256i*>(p);
  _mm256_stream_si256(halves, half(x, 0));
  _mm256_stream_si256(halves + 1, half(x, 1));
}

static inline __m512 cvtph_ps(__m256i x) {
  simde__m512_private r;
  r.m256[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(x));
  r.m256[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1));
  return simde__m512_from_private(r);
}

template <int kRounding>
static inline __m256i cvtps_ph(__m512 x) {
  const simde__m512_private v = simde__m512_to_private(x);
  return _mm256_set_m128i(_mm256_cvtps_ph(v.m256[1], kRounding), _mm256_cvtps_ph(v.m256[0], kRounding));
}

// __m512bh as plain bits: clang would compute with its __bf16 elements, through functions that libgcc lacks.
struct Bf16x32 {
  __m512i bits;
  Bf16x32() = default;
  explicit Bf16x32(__m512i x) : bits(x) {}
};

// VDPBF16PS: the odd product is added first, then the even one, each in an FMA of its own.
static inline __m512 dpbf16_ps(__m512 sum, Bf16x32 a, Bf16x32 b) {
  float s[16];
  uint16_t x[32], y[32];
  __builtin_memcpy(s, &sum, sizeof s);
  __builtin_memcpy(x, &a.bits, sizeof x);
  __builtin_memcpy(y, &b.bits, sizeof y);
  for (int i = 0; i < 16; ++i) {
    s[i] = fma_bf16(s[i], x[2 * i + 1], y[2 * i + 1]);
    s[i] = fma_bf16(s[i], x[2 * i], y[2 * i]);
  }
  __builtin_memcpy(&sum, s, sizeof s);
  return sum;
}

}  // namespace moekern::emulated

#undef _mm512_cvtepu8_epi16
#undef _mm512_cvtepu8_epi32
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepi32_epi16
#undef _mm512_srai_epi32
#undef _mm512_madd_epi16
#undef _mm512_cvtps_epi32
#undef _mm512_stream_si512
#undef _mm512_cvtph_ps
#undef _mm512_cvtps_ph
#undef _mm512_dpbf16_ps
#define _mm512_cvtepu8_epi16 moekern::emulated::cvtepu8_epi16
#define _mm512_cvtepu8_epi32 moekern::emulated::cvtepu8_epi32
#define _mm512_cvtepu16_epi32 moekern::emulated::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 moekern::emulated::cvtepi32_epi16
#define _mm512_srai_epi32 moekern::emulated::srai_epi32
#define _mm512_madd_epi16 moekern::emulated::madd_epi16
#define _mm512_cvtps_epi32 moekern::emulated::cvtps_epi32
#define _mm512_stream_si512 moekern::emulated::stream_si512
#define _mm512_cvtph_ps moekern::emulated::cvtph_ps
#define _mm512_cvtps_ph(X, ROUNDING) moekern::emulated::cvtps_ph<(ROUNDING)>(X)
#define __m512bh moekern::emulated::Bf16x32
#define _mm512_dpbf16_ps moekern::emulated::dpbf16_ps
