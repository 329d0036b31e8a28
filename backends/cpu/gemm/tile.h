// The packed GEMM's two ISA-dependent pieces, written once over the vector vocabulary.
//
// A tile holds MR x NV accumulators. Each step of k loads NV vectors of the strip and broadcasts
// MR activations for MR * NV FMAs; FMA latency 4 x 2 ports needs 8 independent chains, the
// register file (16 or 32) bounds MR * NV + NV + 1 from above.
#pragma once
#include "cpu/gemm/decode.h"
#include "cpu/gemm/ukernel.h"

namespace moekern::cpu {
namespace {

template <int MR, int NV>
inline void tile_rows(int kc, const float* a, int64_t a_stride, const float* b, const float* scale, float* c,
                      int64_t ldc) {
  F32 acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[i][v] = zero();
#pragma GCC unroll 4
  for (int p = 0; p < kc; ++p) {
    F32 bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) bv[v] = load(b + (p * NV + v) * W);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const F32 ai = set1(a[i * a_stride + p]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[i][v] = fma(ai, bv[v], acc[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float* out = c + i * ldc + v * W;
      store(out, fma(acc[i][v], load(scale + v * W), load(out)));
    }
}

template <int MR, int NV>
void tile(int mr, int kc, const void* a, int64_t a_stride, const void* b, const float*, const float* scale, float* c,
          int64_t ldc) {
  if constexpr (MR > 1) {
    if (mr < MR) return tile<MR - 1, NV>(mr, kc, a, a_stride, b, nullptr, scale, c, ldc);
  }
  tile_rows<MR, NV>(kc, static_cast<const float*>(a), a_stride, static_cast<const float*>(b), scale, c, ldc);
}

// W rows at a time: transpose dwords so that a lane is a weight row, then decode. Four consecutive
// k come out of every dword, already k-major.
template <Dtype F, int NV>
bool pack_format(const uint8_t* const* rows, int kc, float* strip) {
  Special<F> special;
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    for (int k = 0; k < kc; k += 4 * W) {
      I32 dwords[W];
      transpose_dwords(rows + v * W, k, dwords);
#pragma GCC unroll 16
      for (int d = 0; d < W; ++d) {
        special.see(dwords[d]);
        F32 w[4];
        Decode<F>::lanes(dwords[d], w);
        float* out = strip + ((k + 4 * d) * NV + v) * W;
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) store(out + j * NV * W, w[j]);
      }
    }
  }
  return special.found();
}

template <int NV>
bool pack(Dtype format, const uint8_t* const* rows, int kc, void* panel) {
  auto* strip = static_cast<float*>(panel);
  switch (format) {
    case Dtype::e5m2: return pack_format<Dtype::e5m2, NV>(rows, kc, strip);
    case Dtype::e4m3fnuz: return pack_format<Dtype::e4m3fnuz, NV>(rows, kc, strip);
    default: return pack_format<Dtype::e4m3fn, NV>(rows, kc, strip);
  }
}

}  // namespace
}  // namespace moekern::cpu
