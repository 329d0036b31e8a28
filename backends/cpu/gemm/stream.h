// The streaming GEMM for few activation rows: every weight is read once, where it lies, decoded in
// registers and used for all M rows. Vectors run along k, so rows of the checkpoint need no
// transposition; a lane sum at the very end makes the dot product.
//
// Per 4W weights: 1 load, 9 operations to decode, 2 to look for NaN, 4 M FMAs. R weight rows are in
// flight at once: R * M independent FMA chains cover the latency, as far as registers allow.
// A chain runs over k in the same order whatever M and R are: a row's bits never depend on M.
#pragma once
#include "cpu/gemm/decode.h"
#include "cpu/gemm/ukernel.h"

namespace moekern::cpu {
namespace {

template <Dtype F, int M, int R>
inline void stream_step(const uint8_t* const* w, int64_t k, const float* a, int64_t a_stride, F32 (&acc)[R][M],
                        Special<F>& special) {
  I32 odd[R], even[R];
  const I32 mask = set1_i32(Decode<F>::kMask);
  F32 v[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const I32 x = load_bytes(w[r] + k);
    special.see(x);
    odd[r] = sra16<Decode<F>::kShift>(x);
    even[r] = sra16<Decode<F>::kShift>(shl16<8>(x));
  }
#pragma GCC unroll 4
  for (int j = 3; j >= 0; --j) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const I32 pair = j & 1 ? odd[r] : even[r];
      v[r] = as_f32(bit_and(j & 2 ? pair : shl32<16>(pair), mask));
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const F32 ai = load(a + i * a_stride + k + j * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r][i] = fma(ai, v[r], acc[r][i]);
    }
  }
}

template <Dtype F, int M, int R>
inline void stream_group(int64_t kc, const uint8_t* w, int64_t ldw, const float* a, int64_t a_stride, float* out,
                         bool first, Special<F>& special) {
  constexpr int kStep = 4 * W;
  F32 acc[R][M];
  const uint8_t* row[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    row[r] = w + r * ldw;
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) acc[r][i] = first ? zero() : load(out + (r * M + i) * W);
  }
  const int64_t whole = kc / kStep * kStep;
  for (int64_t k = 0; k < whole; k += kStep) stream_step<F, M, R>(row, k, a, a_stride, acc, special);
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
bool stream_rows(int rows, int64_t kc, const uint8_t* w, int64_t ldw, const float* a, int64_t a_stride, float* acc,
                 bool first) {
  Special<F> special;
  int r = 0;
  for (; r + R <= rows; r += R)
    stream_group<F, M, R>(kc, w + r * ldw, ldw, a, a_stride, acc + r * M * W, first, special);
  for (; r < rows; ++r) stream_group<F, M, 1>(kc, w + r * ldw, ldw, a, a_stride, acc + r * M * W, first, special);
  return special.found();
}

// 16 vector registers hold R * M accumulators, R bytes vectors in two halves, R weights, an
// activation and the constants; 32 hold twice that.
constexpr int rows_in_flight(int m) { return W == 16 ? (m <= 2 ? 8 : m <= 5 ? 4 : 2) : (m == 1 ? 4 : m == 2 ? 4 : m <= 4 ? 2 : 1); }
constexpr int kStreamRows = 8;

template <Dtype F>
bool stream_format(int m, int rows, int64_t kc, const uint8_t* w, int64_t ldw, const float* a, int64_t a_stride,
                   float* acc, bool first) {
  switch (m) {
    case 1: return stream_rows<F, 1, rows_in_flight(1)>(rows, kc, w, ldw, a, a_stride, acc, first);
    case 2: return stream_rows<F, 2, rows_in_flight(2)>(rows, kc, w, ldw, a, a_stride, acc, first);
    case 3: return stream_rows<F, 3, rows_in_flight(3)>(rows, kc, w, ldw, a, a_stride, acc, first);
    case 4: return stream_rows<F, 4, rows_in_flight(4)>(rows, kc, w, ldw, a, a_stride, acc, first);
    case 5: return stream_rows<F, 5, rows_in_flight(5)>(rows, kc, w, ldw, a, a_stride, acc, first);
    case 6: return stream_rows<F, 6, rows_in_flight(6)>(rows, kc, w, ldw, a, a_stride, acc, first);
    case 7: return stream_rows<F, 7, rows_in_flight(7)>(rows, kc, w, ldw, a, a_stride, acc, first);
    default: return stream_rows<F, 8, rows_in_flight(8)>(rows, kc, w, ldw, a, a_stride, acc, first);
  }
}

bool stream(Dtype format, int m, int rows, int64_t kc, const uint8_t* w, int64_t ldw, const float* a, int64_t a_stride,
            float* acc, bool first) {
  switch (format) {
    case Dtype::e5m2: return stream_format<Dtype::e5m2>(m, rows, kc, w, ldw, a, a_stride, acc, first);
    case Dtype::e4m3fnuz: return stream_format<Dtype::e4m3fnuz>(m, rows, kc, w, ldw, a, a_stride, acc, first);
    default: return stream_format<Dtype::e4m3fn>(m, rows, kc, w, ldw, a, a_stride, acc, first);
  }
}

// Vector j of every 4W elements takes the elements 4i + j: the order in which Decode yields weights.
void permute(const float* src, int64_t n, float* dst) {
  for (int64_t k = 0; k < n; k += 4 * W)
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < W; ++i) dst[k + j * W + i] = src[k + 4 * i + j];
}

void reduce(const float* acc, int64_t count, float* sums) {
  for (int64_t i = 0; i < count; ++i) sums[i] = reduce_add(load(acc + i * W));
}

}  // namespace
}  // namespace moekern::cpu
