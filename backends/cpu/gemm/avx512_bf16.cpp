// Packed GEMM over bf16 pairs for AVX-512 BF16 + VBMI (Zen 4 and later, Sapphire Rapids and later).
//
// e4m3 and e5m2 values are bf16 values, so panels hold them exactly and VDPBF16PS does two
// multiply-adds a lane: twice the f32 rate. MR x NV = 12 x 2 is 24 accumulators + 2 of b + 1 of a in 32
// registers, and 14 loads for 24 dot products. 6 x 4 takes 10 and is 4% faster from 128 rows of a on, but
// slower up to 32, the sizes of groups in a mixture of experts.
#include "cpu/simd/avx512.h"

#include "cpu/gemm/pack_bf16.h"
#include "cpu/gemm/ukernel.h"
#include "cpu/rows.h"

#include "cpu/gemm/stream_bf16.h"

namespace moekern::cpu {
namespace {

constexpr int MR = 12, NV = 2;

template <int M>
inline void tile_rows(int kc, const uint16_t* a, int64_t a_stride, const uint32_t* b, const float* row_scale,
                      const float* scale, float* c, int64_t ldc) {
  F32 acc[M][NV];
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[i][v] = zero();
#pragma GCC unroll 2
  for (int p = 0; p < kc; p += 2) {
    __m512bh bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) bv[v] = (__m512bh)_mm512_load_si512(b + (p / 2 * NV + v) * W);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      int pair;
      __builtin_memcpy(&pair, a + i * a_stride + p, sizeof pair);
      const __m512bh ai = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[i][v] = _mm512_dpbf16_ps(acc[i][v], ai, bv[v]);
    }
  }
#pragma GCC unroll 12
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
  tile_rows<M>(kc, static_cast<const uint16_t*>(a), a_stride, static_cast<const uint32_t*>(b), row_scale, scale, c,
               ldc);
}

}  // namespace

constexpr Stream kStream = stream_up_to(12);

extern const GemmIsa k_avx512_bf16;
constexpr GemmIsa k_avx512_bf16 = {&kRowOps, Dtype::bf16, W, MR, NV * W, 2, pack<NV>, tile<MR>, &kStream};

}  // namespace moekern::cpu
