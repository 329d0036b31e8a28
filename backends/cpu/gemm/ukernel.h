// What one ISA's micro-kernels offer to gemm/driver.cpp. The ISA files (gemm/<isa>.cpp) fill one
// of these each; the driver is compiled once, without ISA flags, and calls through the pointers.
#pragma once
#include <cstdint>

#include "moekern/dtype.h"
#include "moekern/gating.h"

namespace moekern::cpu {

constexpr int kBlock = 128;  // k advances one scale block at a time, in both kernels

// Rows of x to cast to FP8 together, `width` columns after another: the blocks are as tall as the panel, and
// one column wide or kBlock. Strides of rows are in bytes.
constexpr int64_t kWidestRow = 2048, kWidestPanel = 512;  // columns of one row, of 128
struct CastPanel {
  const char* x;
  int64_t x_stride, rows, cols;
  int64_t width;  // a multiple of kBlock, at most kWidestRow, and at most kWidestPanel if by_column
  bool by_column;
  uint8_t* q;
  int64_t q_stride;
  float* scale;
  int64_t scale_stride;  // in floats
  bool round_scale_up;
  const char* next;  // what will be read next, with the strides of x: for prefetching only
  bool past_caches;  // how q is to be written; its rows are then aligned to 64 bytes
};

// Row primitives, shared with quant/. n is free: tails are handled inside, nothing past n is touched.
struct RowOps {
  void (*load)(Dtype, const char* src, int64_t n, float* dst);   // exact
  void (*store)(Dtype, const float* src, int64_t n, char* dst);  // f32, f16, bf16: round to nearest even
  float (*amax)(const float* x, int64_t n);                      // max |x|; NaN is above infinity
  void (*scale)(const float* x, float s, int64_t n, float* dst);
  // From f32, f16 or bf16: scale = max(amax, 1e-4) / max, q = rne(clamp(x * (1 / scale), +-max)).
  void (*cast_panel)(Dtype from, Dtype to, const CastPanel&);
  // dst[i] = x[i] * scale[i / block], `finite` if all scales are; past_caches as in CastPanel.
  void (*dequantize)(Dtype from, Dtype to, const uint8_t* x, const float* scale, int64_t block, bool finite, int64_t n,
                     char* dst, bool past_caches);
  // dst = activation(gate) * up, of f32, f16 or bf16. What is `ahead` bytes further on will be read next.
  void (*gated)(const Gating&, Dtype, const char* gate, const char* up, int64_t n, float* dst, int64_t ahead);
};

// c[i, :] += row_scale[i] * scale[:] * sum_p a[i, p] * b_strip[p, :] for mr rows; kc is a multiple of
// 4 * lanes. a: mr rows of kc values, `a_stride` values apart. b_strip: k-major and nr wide, in the
// groups of kr that dot-product instructions take: b_strip[p / kr][n][p % kr]. For an f32 panel
// row_scale is null: it is in a.
using TileFn = void (*)(int mr, int kc, const void* a, int64_t a_stride, const void* b_strip, const float* row_scale,
                        const float* scale, float* c, int64_t ldc);

// nr rows of kc FP8 weights -> a strip; true if there was a value that the fast decoder cannot
// express (a NaN or an infinity). f32 panels hold value * 2^-(127 - bias), bf16 panels the value.
using PackFn = bool (*)(Dtype, const uint8_t* const* rows, int kc, void* strip);

// acc[r][i][0 .. lanes) (+)= the partial products of weight row r with activation row i over kc elements. a: m
// rows of the stream's panel type, `a_stride` values apart, zero-padded to a multiple of 128 and permuted by
// `permute`. bf16 rows have their scales, one per 128 of k and rows `scale_stride` apart; f32 rows contain theirs.
// True as for PackFn. Weights are read once, in place, and nothing past kc is read; `ahead` bytes further on is
// what will be wanted next, for prefetching only.
using StreamFn = bool (*)(Dtype, int m, int rows, int64_t kc, const uint8_t* w, int64_t ldw, int64_t ahead,
                          const void* a, int64_t a_stride, const float* scale, int64_t scale_stride, float* acc,
                          bool first);

struct Stream {
  Dtype panel;    // f32 or bf16
  int max_m;      // more activation rows than this are faster packed
  int pass_rows;  // activation rows that one pass of `run` takes at most
  StreamFn run;
  void (*permute)(const float* src, int64_t n, void* dst);  // n is a multiple of 128; reads to n + lanes
  // sums[i * ld + r] = the lanes of acc[r][i], added up.
  void (*reduce)(const float* acc, int m, int rows, float* sums, int64_t ld);
};

struct GemmIsa {
  const RowOps* rows;
  Dtype panel;  // f32 or bf16
  int lanes;    // f32 lanes of a vector: k is padded to 4 of them
  int mr, nr, kr;
  PackFn pack;
  TileFn tile;
  const Stream* stream;  // null without one
};

}  // namespace moekern::cpu
