// What one ISA's micro-kernels offer to gemm/driver.cpp. The ISA files (gemm/<isa>.cpp) fill one
// of these each; the driver is compiled once, without ISA flags, and calls through the pointers.
#pragma once
#include <cstdint>

#include "moekern/dtype.h"

namespace moekern::cpu {

constexpr int kBlock = 128;  // k advances one scale block at a time, in both kernels

// Row primitives, shared with quant/. n is free: tails are handled inside, nothing past n is touched.
struct RowOps {
  void (*load)(Dtype, const char* src, int64_t n, float* dst);           // exact
  void (*store)(Dtype, const float* src, int64_t n, char* dst);          // f32, f16, bf16: round to nearest even
  float (*amax)(const float* x, int64_t n);                              // NaN if there is one
  void (*scale)(const float* x, float s, int64_t n, float* dst);
  void (*quantize)(Dtype, const float* x, float s, int64_t n, uint8_t* dst);  // rne(clamp(x * s, +-max))
  void (*silu_mul)(const float* gate, const float* up, int64_t n, float* dst);
};

// c[i, :] += scale[:] * sum_p a[i, p] * b_strip[p, :] for mr rows.
// a: mr rows of `kc` f32, `a_stride` apart. b_strip: k-major, nr wide. kc is a multiple of 4W.
using TileFn = void (*)(int mr, int kc, const float* a, int64_t a_stride, const float* b_strip, const float* scale,
                        float* c, int64_t ldc);

// nr rows of kc FP8 weights -> a k-major strip of value * 2^-(127 - bias); true if a NaN or an
// infinity was met (and decoded to nonsense). kc is a multiple of 4W.
using PackFn = bool (*)(Dtype, const uint8_t* const* rows, int kc, float* strip);

// acc[r][i][0 .. lanes) (+)= the partial products of weight row r with activation row i over kc
// elements. a: m rows of f32, `a_stride` apart, zero-padded to a multiple of 4 * lanes and permuted
// by `permute`. True as for PackFn. Weights are read once, in place, and nothing past kc is read.
using StreamFn = bool (*)(Dtype, int m, int rows, int64_t kc, const uint8_t* w, int64_t ldw, const float* a,
                          int64_t a_stride, float* acc, bool first);

struct GemmIsa {
  const RowOps* rows;
  int mr, nr;
  PackFn pack;
  TileFn tile;
  int lanes;              // W; 0 when there is no streaming kernel
  int stream_rows;        // activation rows that one pass of `stream` takes at most
  StreamFn stream;
  void (*permute)(const float* src, int64_t n, float* dst);               // n is a multiple of 4 * lanes
  void (*reduce)(const float* acc, int64_t count, float* sums);           // count vectors -> count sums
};

}  // namespace moekern::cpu
