// What one ISA's micro-kernels offer to gemm/driver.cpp. The ISA files (gemm/<isa>.cpp) fill one
// of these each; the driver is compiled once, without ISA flags, and calls through the pointers.
#pragma once
#include <cstdint>

#include "moekern/dtype.h"
#include "moekern/gating.h"

namespace moekern::cpu {

constexpr int kBlock = 128;  // k advances one scale block at a time, in both kernels

// Row primitives, shared with quant/. n is free: tails are handled inside, nothing past n is touched.
struct RowOps {
  void (*load)(Dtype, const char* src, int64_t n, float* dst);   // exact
  void (*store)(Dtype, const float* src, int64_t n, char* dst);  // f32, f16, bf16: round to nearest even
  // Of f32, f16 or bf16: amax[i / block] = max(amax[i / block], |x[i]|); NaN is above infinity and stays.
  void (*amax)(Dtype, const char* x, int64_t n, int64_t block, float* amax);
  void (*scale)(const float* x, float s, int64_t n, float* dst);
  // dst[i] = rne(clamp(x[i] * s[i / block], +-max)). `bounded` promises finite x and |x * s| <= max but for
  // rounding. `next` is what the caller will read next, for prefetching only.
  void (*quantize)(Dtype from, const char* x, const float* s, int64_t block, bool bounded, int64_t n, Dtype to,
                   uint8_t* dst, const char* next);
  void (*gated)(const Gating&, const float* gate, const float* up, int64_t n, float* dst);  // activation(gate) * up
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

// acc[r][i][0 .. lanes) (+)= the partial products of weight row r with activation row i over kc elements. a: m rows of
// f32, `a_stride` apart, zero-padded to a multiple of 4 * lanes and permuted by `permute`. True as for PackFn. Weights
// are read once, in place, and nothing past kc is read; `ahead` bytes further on is what will be wanted next, for
// prefetching only.
using StreamFn = bool (*)(Dtype, int m, int rows, int64_t kc, const uint8_t* w, int64_t ldw, int64_t ahead,
                          const float* a, int64_t a_stride, float* acc, bool first);

struct Stream {
  int max_m;      // more activation rows than this are faster packed
  int pass_rows;  // activation rows that one pass of `run` takes at most
  StreamFn run;
  void (*permute)(const float* src, int64_t n, float* dst);  // n is a multiple of 4 * lanes; reads to n + lanes
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
