// Scales as kernels read them, and the sums that need more than float32.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/kernels/scheduler.cuh"

namespace moekern::cuda {

// A bit pattern of ue8m0 as float32: 2^(code - 127), 255 is NaN.
__device__ inline float ue8m0(uint32_t code) {
  return __uint_as_float(code == 0 ? 0x00400000u : code == 255 ? 0x7FFFFFFFu : code << 23);
}

__device__ inline float scale_at(const Scales& s, int64_t i) {
  return s.ue8m0 ? ue8m0(static_cast<const uint8_t*>(s.values)[i]) : static_cast<const float*>(s.values)[i];
}

__device__ inline int64_t scale_row(const Scales& s, int g, int row) {
  return g * s.group_stride + row / s.block_rows * s.row_stride;
}

__device__ inline float load_float(const void* data, int64_t i, Dtype dtype) {
  if (dtype == Dtype::f32) return static_cast<const float*>(data)[i];
  if (dtype == Dtype::f16) return __half2float(static_cast<const __half*>(data)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
}

__device__ inline void store_float(void* data, int64_t i, Dtype dtype, float x) {
  if (dtype == Dtype::f32)
    static_cast<float*>(data)[i] = x;
  else if (dtype == Dtype::f16)
    static_cast<__half*>(data)[i] = __float2half_rn(x);
  else
    static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(x);
}

// e4m3: its exponent and mantissa, as float32's, are too small by 2^(127 - 7).
__device__ inline float e4m3(uint32_t code) {
  const float size = __uint_as_float((code & 0x7F) << 20) * 0x1p120f;
  const float x = (code & 0x7F) == 0x7F ? __uint_as_float(0x7FFFFFFFu) : size;
  return code & 0x80 ? -x : x;
}

__device__ inline bool finite(float x) { return fabsf(x) < __uint_as_float(0x7F800000u); }

// The product of both scales of a step.
struct ScalesAt {
  const Scales &a, &b;
  int64_t row_a, row_b;

  __device__ double operator()(int step) const {
    return static_cast<double>(scale_at(a, row_a + step / a.steps * a.step_stride)) *
           scale_at(b, row_b + step / b.steps * b.step_stride);
  }
};

// A sum that is infinite or NaN in float32, once more in float64 if it may have overflowed on the way: its scales are
// so large that k products of 448 x 448 < 2^18 could. Otherwise that is what its operands say, and `sum` is right.
__device__ inline float repaired(const GemmParameters& p, const Tile& tile, int row, int column, float sum) {
  const ScalesAt scale{p.sa, p.sb, scale_row(p.sa, tile.slot, row), scale_row(p.sb, tile.group, column)};
  const int first = tile.first / kStep, steps = divide_up(tile.k, kStep);
  double largest = 0;
  for (int s = 0; s < steps; ++s) largest = fmax(largest, fabs(scale(first + s)));
  if (largest * tile.k < 0x1p109) return sum;
  const uint8_t* a = p.a.data + tile.slot * p.a.group_stride + row * p.a.row_stride;
  const uint8_t* b = p.b.data + tile.group * p.b.group_stride + column * p.b.row_stride;
  double total = 0;
#pragma unroll 1
  for (int s = 0; s < steps; ++s) {
    const int from = tile.first + s * kStep, end = min(from + kStep, tile.first + tile.k);
    float part = 0;
#pragma unroll 1
    for (int64_t i = from; i < end; ++i)
      part = fmaf(e4m3(a[i * p.a.column_stride]), e4m3(b[i * p.b.column_stride]), part);
    total += part * scale(first + s);
  }
  return static_cast<float>(total);
}

// The result at (row, column) of a tile's product, whose sum is `sum`.
__device__ inline void finish(const GemmParameters& p, const Tile& tile, int row, int column, float sum) {
  if (!finite(sum)) sum = repaired(p, tile, row, column, sum);
  if (p.bias.data) sum += load_float(p.bias.data, column * p.bias.column_stride, p.bias.dtype);
  if (p.c.data)
    sum += load_float(p.c.data, tile.slot * p.c.group_stride + row * p.c.row_stride + column * p.c.column_stride,
                      p.c.dtype);
  const int64_t at = tile.slot * p.out.group_stride + row * p.out.row_stride + column * p.out.column_stride;
  store_float(p.out.data, at, p.out.dtype, sum);
}

}  // namespace moekern::cuda
