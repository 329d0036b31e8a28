// Dot products from vectors of partial sums, for both streaming kernels.
#pragma once

// Included after one simd/*.h: everything here is per ISA.
#include "cpu/gemm/ukernel.h"

namespace moekern::cpu {
namespace {

// Lane i of out[d] = element d of x[i], for d < D: what is not asked for costs nothing.
template <int D>
inline void transpose(const float* const* x, F32* out) {
  const uint8_t* rows[W];
  I32 dwords[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) rows[i] = reinterpret_cast<const uint8_t*>(x[i]);
  transpose_dwords(rows, 0, dwords);
#pragma GCC unroll 16
  for (int d = 0; d < D; ++d) out[d] = as_f32(dwords[d]);
}

// W dot products at a time: a vector of them is the sum of the lanes, transposed.
void reduce(const float* acc, int m, int rows, float* sums, int64_t ld) {
  for (int i = 0; i < m; ++i) {
    for (int r = 0; r < rows; r += W) {
      const float* from[W];
      F32 lane[W];
#pragma GCC unroll 16
      for (int q = 0; q < W; ++q) from[q] = acc + ((r + q < rows ? r + q : r) * m + i) * W;
      transpose<W>(from, lane);
#pragma GCC unroll 4
      for (int half = W / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int q = 0; q < half; ++q) lane[q] = add(lane[q], lane[q + half]);
      if (r + W <= rows) {
        store(sums + i * ld + r, lane[0]);
      } else {
        alignas(64) float last[W];
        store(last, lane[0]);
        __builtin_memcpy(sums + i * ld + r, last, static_cast<size_t>(rows - r) * sizeof(float));
      }
    }
  }
}

}  // namespace
}  // namespace moekern::cpu
