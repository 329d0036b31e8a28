// Packs FP8 weights into the bf16 pairs that VDPBF16PS and TDPBF16PS take. Needs AVX-512 VBMI.
#pragma once

// Included after simd/avx512.h.
#include "cpu/gemm/ukernel.h"
#include "moekern/float_formats.h"

namespace moekern::cpu {
namespace {

// The two bytes of every magnitude code's bf16, for VPERMI2B: 7 bits of index, the sign is ignored.
struct DecodeTable {
  alignas(64) uint8_t low[128], high[128];
  bool minus_zero_is_nan;
};

DecodeTable make_table(Dtype format) {
  DecodeTable t;
  for (int code = 0; code < 128; ++code) {
    const uint16_t value = f32_to_bf16(fp8_to_f32(format, static_cast<uint8_t>(code)));
    t.low[code] = static_cast<uint8_t>(value);
    t.high[code] = static_cast<uint8_t>(value >> 8);
  }
  t.minus_zero_is_nan = format == Dtype::e4m3fnuz;
  return t;
}

const DecodeTable& table_of(Dtype format) {
  static const DecodeTable kE4m3fn = make_table(Dtype::e4m3fn), kE4m3fnuz = make_table(Dtype::e4m3fnuz),
                           kE5m2 = make_table(Dtype::e5m2);
  return format == Dtype::e5m2 ? kE5m2 : format == Dtype::e4m3fnuz ? kE4m3fnuz : kE4m3fn;
}

inline __m512i lookup(const uint8_t* table, __m512i codes) {
  return _mm512_permutex2var_epi8(_mm512_load_si512(table), codes, _mm512_load_si512(table + 64));
}

template <int NV>
bool pack(Dtype format, const uint8_t* const* rows, int kc, void* panel) {
  const DecodeTable& table = table_of(format);
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
  auto* strip = static_cast<uint32_t*>(panel);  // a pair a dword
  __mmask64 nan = 0;
  for (int v = 0; v < NV; ++v) {
    for (int k = 0; k < kc; k += 4 * W) {
      I32 dwords[W];  // lane r of dwords[d]: the bytes k + 4d .. k + 4d + 3 of row r
      transpose_dwords(rows + v * W, k, dwords);
#pragma GCC unroll 16
      for (int d = 0; d < W; ++d) {
        const __m512i x = dwords[d];
        nan |= _mm512_cmpeq_epi8_mask(x, sign);
        const __m512i low = lookup(table.low, x);
        // high byte | sign: ternary logic a | (b & c)
        const __m512i high = _mm512_ternarylogic_epi64(lookup(table.high, x), x, sign, 0xf8);
        // Interleaved, every 128-bit lane holds two rows' pairs (k, k+1) and (k+2, k+3).
        const __m512 a = _mm512_castsi512_ps(_mm512_unpacklo_epi8(low, high));
        const __m512 b = _mm512_castsi512_ps(_mm512_unpackhi_epi8(low, high));
        uint32_t* out = strip + ((k + 4 * d) / 2 * NV + v) * W;
        _mm512_storeu_ps(out, _mm512_shuffle_ps(a, b, 0x88));
        _mm512_storeu_ps(out + NV * W, _mm512_shuffle_ps(a, b, 0xdd));
      }
    }
  }
  return table.minus_zero_is_nan && nan;
}

}  // namespace
}  // namespace moekern::cpu
