// The streaming GEMM for few activation rows: every weight is read once, where it lies, decoded in
// registers and used for all M rows. Vectors run along k, so rows of the checkpoint need no
// transposition; a lane sum at the very end makes the dot product.
//
// Per 4W weights and row: 4 loads, 11 operations to decode, 2 to look for NaN, 4 M FMAs. FMAs take two
// ports, and so do loads: R weight rows are in flight at once so that a load of an activation serves R
// FMAs, and R * M independent chains hide FMA latency 4 x 2 ports from 8 on. A chain runs over k in the same
// order whatever M and R are: a row's bits never depend on M.
#pragma once
#include "cpu/gemm/decode.h"
#include "cpu/gemm/stream_sums.h"

namespace moekern::cpu {
namespace {

template <Dtype F, int M, int R>
inline void stream_step(const uint8_t* const* w, int64_t k, const float* a, int64_t a_stride, F32 (&acc)[R][M],
                        Special<F>& special) {
  if constexpr (M == 1) {  // registers for what Decode::lanes shares between the four
    F32 x[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) x[j] = load_once(a + k + j * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const I32 bytes = load_bytes(w[r] + k);
      special.see(bytes);
      F32 v[4];
      Decode<F>::lanes(bytes, v);
#pragma GCC unroll 4
      for (int j = 3; j >= 0; --j) acc[r][0] = fma(x[j], v[j], acc[r][0]);
    }
  } else {
#pragma GCC unroll 4
    for (int j = 3; j >= 0; --j) {
      F32 v[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const I32 bytes = load_bytes(w[r] + k);
        if (j == 3) special.see(bytes);
        v[r] = Decode<F>::lane(bytes, j);
      }
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        const F32 x = load_once(a + i * a_stride + k + j * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[r][i] = fma(x, v[r], acc[r][i]);
      }
    }
  }
}

// `ahead`: bytes from a weight to the one that is wanted a task later, when it will have come from memory.
// A function of its own and a body of one step for three or four rows, of two otherwise: so that gcc finds
// registers for all accumulators whatever is around them. Spilled, the loop runs at 60% of this.
template <Dtype F, int M, int R>
__attribute__((noinline)) void stream_group(int64_t kc, const uint8_t* w, int64_t ldw, int64_t ahead, const float* a,
                                            int64_t a_stride, float* out, bool first, Special<F>& special) {
  constexpr int kStep = 4 * W, kBody = kStep < 64 && M != 3 && M != 4 ? 64 : kStep;
  F32 acc[R][M];
  const uint8_t* row[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    row[r] = w + r * ldw;
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) acc[r][i] = first ? zero() : load(out + (r * M + i) * W);
  }
  const int64_t whole = kc / kStep * kStep;
  int64_t k = 0;
  for (; k + kBody <= whole; k += kBody) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      if (kBody >= 64 || k % 64 == 0) __builtin_prefetch(row[r] + (k + ahead), 0, 2);
#pragma GCC unroll 4
    for (int step = 0; step < kBody; step += kStep) stream_step<F, M, R>(row, k + step, a, a_stride, acc, special);
  }
  for (; k < whole; k += kStep) stream_step<F, M, R>(row, k, a, a_stride, acc, special);
  if (whole < kc) {  // a partial vector: copied, since the bytes behind it are not ours to read
    alignas(64) uint8_t tail[R][kStep] = {};
    const uint8_t* at[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      __builtin_memcpy(tail[r], row[r] + whole, static_cast<size_t>(kc - whole));
      at[r] = tail[r] - whole;
    }
    stream_step<F, M, R>(at, whole, a, a_stride, acc, special);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) store(out + (r * M + i) * W, acc[r][i]);
}

template <Dtype F, int M, int R>
inline void stream_rows(int rows, int64_t kc, const uint8_t* w, int64_t ldw, int64_t ahead, const float* a,
                        int64_t a_stride, float* acc, bool first, Special<F>& special) {
  int r = 0;
  for (; r + R <= rows; r += R)
    stream_group<F, M, R>(kc, w + r * ldw, ldw, ahead, a, a_stride, acc + r * M * W, first, special);
  if constexpr (R > 1)
    stream_rows<F, M, (R + 1) / 2>(rows - r, kc, w + r * ldw, ldw, ahead, a, a_stride, acc + r * M * W, first, special);
}

// R M accumulators, R weights and an activation, and the mask. Sixteen registers (AVX2) carry 6 rows,
// thirty-two (AVX-512, NEON, SVE) carry 8.
constexpr int kPassRows = kRegisters == 16 ? 6 : 8;
constexpr int rows_in_flight(int m) {
  return kRegisters == 16 ? (m <= 2 ? 4 : m == 3 ? 3 : 2) : (m == 1 ? 8 : m <= 5 ? 4 : 3);
}

template <Dtype F, int M = kPassRows>
bool stream_format(int m, int rows, int64_t kc, const uint8_t* w, int64_t ldw, int64_t ahead, const float* a,
                   int64_t a_stride, float* acc, bool first) {
  if constexpr (M > 1) {
    if (m < M) return stream_format<F, M - 1>(m, rows, kc, w, ldw, ahead, a, a_stride, acc, first);
  }
  Special<F> special;
  stream_rows<F, M, rows_in_flight(M)>(rows, kc, w, ldw, ahead, a, a_stride, acc, first, special);
  return special.found();
}

bool stream(Dtype format, int m, int rows, int64_t kc, const uint8_t* w, int64_t ldw, int64_t ahead, const void* a,
            int64_t a_stride, const float*, int64_t, float* acc, bool first) {
  const auto* x = static_cast<const float*>(a);
  switch (format) {
    case Dtype::e5m2: return stream_format<Dtype::e5m2>(m, rows, kc, w, ldw, ahead, x, a_stride, acc, first);
    case Dtype::e4m3fnuz: return stream_format<Dtype::e4m3fnuz>(m, rows, kc, w, ldw, ahead, x, a_stride, acc, first);
    default: return stream_format<Dtype::e4m3fn>(m, rows, kc, w, ldw, ahead, x, a_stride, acc, first);
  }
}

// Vector j of every 4W elements takes the elements 4i + j: the order in which Decode yields weights.
void permute(const float* src, int64_t n, void* dst) {
  auto* out = static_cast<float*>(dst);
  for (int64_t k = 0; k < n; k += 4 * W) {
    const float* from[W];
    F32 to[4];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) from[i] = src + k + 4 * i;
    transpose<4>(from, to);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) store(out + k + j * W, to[j]);
  }
}

constexpr Stream stream_up_to(int max_m) { return {Dtype::f32, max_m, kPassRows, stream, permute, reduce}; }

}  // namespace
}  // namespace moekern::cpu
