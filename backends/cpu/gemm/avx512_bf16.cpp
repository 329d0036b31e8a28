// Packed GEMM over bf16 pairs for AVX-512 BF16 + VBMI (Zen 4 and later, Sapphire Rapids and later).
//
// e4m3 and e5m2 values are bf16 values, so panels hold them exactly and VDPBF16PS does two
// multiply-adds a lane: twice the f32 rate. MR x NV = 6 x 4 is 24 accumulators + 4 of b + 1 of a in 32
// registers; 10 loads feed 24 dot products.
#include "cpu/simd/avx512.h"

#include "cpu/gemm/ukernel.h"
#include "cpu/rows.h"

namespace moekern::cpu {
namespace {

constexpr int MR = 6, NV = 4;

// The two bytes of every magnitude code's bf16, for VPERMI2B: 7 bits of index, the sign is ignored.
struct DecodeTable {
  alignas(64) uint8_t low[128], high[128];
  bool minus_zero_is_nan;
};

DecodeTable table_of(Dtype format) {
  DecodeTable t;
  for (int code = 0; code < 128; ++code) {
    const uint16_t value = f32_to_bf16(fp8_to_f32(format, static_cast<uint8_t>(code)));
    t.low[code] = static_cast<uint8_t>(value);
    t.high[code] = static_cast<uint8_t>(value >> 8);
  }
  t.minus_zero_is_nan = format == Dtype::e4m3fnuz;
  return t;
}

inline __m512i lookup(const uint8_t* table, __m512i codes) {
  return _mm512_permutex2var_epi8(_mm512_load_si512(table), codes, _mm512_load_si512(table + 64));
}

bool pack(Dtype format, const uint8_t* const* rows, int kc, void* panel) {
  static const DecodeTable kE4m3fn = table_of(Dtype::e4m3fn), kE4m3fnuz = table_of(Dtype::e4m3fnuz), kE5m2 = table_of(Dtype::e5m2);
  const DecodeTable& table = format == Dtype::e5m2 ? kE5m2 : format == Dtype::e4m3fnuz ? kE4m3fnuz : kE4m3fn;
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

template <int M>
inline void tile_rows(int kc, const uint16_t* a, int64_t a_stride, const uint32_t* b, const float* row_scale,
                      const float* scale, float* c, int64_t ldc) {
  F32 acc[M][NV];
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[i][v] = zero();
#pragma GCC unroll 2
  for (int p = 0; p < kc; p += 2) {
    __m512bh bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) bv[v] = (__m512bh)_mm512_load_si512(b + (p / 2 * NV + v) * W);
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) {
      int pair;
      __builtin_memcpy(&pair, a + i * a_stride + p, sizeof pair);
      const __m512bh ai = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[i][v] = _mm512_dpbf16_ps(acc[i][v], ai, bv[v]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float* out = c + i * ldc + v * W;
      store(out, fma(mul(acc[i][v], set1(row_scale[i])), load(scale + v * W), load(out)));
    }
}

template <int M = MR>
void tile(int mr, int kc, const void* a, int64_t a_stride, const void* b, const float* row_scale, const float* scale,
          float* c, int64_t ldc) {
  if constexpr (M > 1) {
    if (mr < M) return tile<M - 1>(mr, kc, a, a_stride, b, row_scale, scale, c, ldc);
  }
  tile_rows<M>(kc, static_cast<const uint16_t*>(a), a_stride, static_cast<const uint32_t*>(b), row_scale, scale, c, ldc);
}

}  // namespace

extern const GemmIsa k_avx512_bf16;
constexpr GemmIsa k_avx512_bf16 = {&kRowOps, Dtype::bf16, W, MR, NV * W, 2, pack, tile<MR>, nullptr};

}  // namespace moekern::cpu
