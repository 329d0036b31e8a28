// The streaming GEMM for few activation rows: every weight is read once, where it lies, decoded in
// registers and used for all M rows. Vectors run along k, so rows of the checkpoint need no
// transposition; a lane sum at the very end makes the dot product.
//
// Per 4W weights: 1 load, 9 operations to decode, 2 to look for NaN, 4 M FMAs. FMA latency 4 x 2 ports
// wants 8 independent chains: R weight rows are in flight at once, and every dot product has two
// chains, one over the odd bytes of a word and one over the even. A chain runs over k in the same
// order whatever M and R are: a row's bits never depend on M.
#pragma once
#include "cpu/gemm/decode.h"
#include "cpu/gemm/ukernel.h"

namespace moekern::cpu {
namespace {

template <Dtype F, int M, int R>
inline void stream_step(const uint8_t* const* w, int64_t k, const float* a, int64_t a_stride, F32 (&acc)[R][M][2],
                        Special<F>& special) {
  const I32 mask = set1_i32(Decode<F>::kMask);
#pragma GCC unroll 2
  for (int parity = 1; parity >= 0; --parity) {
    I32 pair[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const I32 x = load_bytes(w[r] + k);
      if (parity) special.see(x);
      pair[r] = sra16<Decode<F>::kShift>(parity ? x : shl16<8>(x));
    }
#pragma GCC unroll 2
    for (int j = parity + 2; j >= 0; j -= 2) {
      F32 v[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) v[r] = as_f32(bit_and(j & 2 ? pair[r] : shl32<16>(pair[r]), mask));
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        const F32 ai = load(a + i * a_stride + k + j * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[r][i][parity] = fma(ai, v[r], acc[r][i][parity]);
      }
    }
  }
}

// `next` is what the core will read a little later than this group (`kAhead`).
template <Dtype F, int M, int R>
inline void stream_group(int64_t kc, const uint8_t* w, int64_t ldw, const uint8_t* next, const float* a,
                         int64_t a_stride, float* out, bool first, Special<F>& special) {
  constexpr int kStep = 4 * W;
  // One prefetch a cache line; but from M = 5 on, 16 registers are too few for a longer body.
  constexpr int kBody = M <= 4 && kStep < 64 ? 64 : kStep;
  F32 acc[R][M][2];
  const uint8_t* row[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    row[r] = w + r * ldw;
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
      for (int q = 0; q < 2; ++q) acc[r][i][q] = first ? zero() : load(out + ((r * M + i) * 2 + q) * W);
  }
  const int64_t whole = kc / kStep * kStep;
  int64_t k = 0;
  for (; k + kBody <= whole; k += kBody) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) __builtin_prefetch(next + r * ldw + k);
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
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
      for (int q = 0; q < 2; ++q) store(out + ((r * M + i) * 2 + q) * W, acc[r][i][q]);
}

// The hardware's prefetcher stops at the end of every row's piece, so software asks for what comes
// 4 KiB later: at 16 GB/s a core that is 250 ns, twice the latency of memory.
constexpr int64_t kAhead = 4096;

template <Dtype F, int M, int R>
bool stream_rows(int rows, int64_t kc, const uint8_t* w, int64_t ldw, const uint8_t* after, const float* a,
                 int64_t a_stride, float* acc, bool first) {
  Special<F> special;
  const int ahead = static_cast<int>((kAhead + kc - 1) / kc + R - 1) / R * R;
  const auto next = [&](int r) { return r + ahead < rows ? w + (r + ahead) * ldw : after + (r + ahead - rows) * ldw; };
  int r = 0;
  for (; r + R <= rows; r += R)
    stream_group<F, M, R>(kc, w + r * ldw, ldw, next(r), a, a_stride, acc + r * M * 2 * W, first, special);
  for (; r < rows; ++r)
    stream_group<F, M, 1>(kc, w + r * ldw, ldw, next(r), a, a_stride, acc + r * M * 2 * W, first, special);
  return special.found();
}

// 2 R M accumulators beside R decoded words, a weight, an activation and the mask. Sixteen registers
// (AVX2) carry 6 rows, thirty-two (AVX-512, NEON, SVE) carry 8.
constexpr int kPassRows = kRegisters == 16 ? 6 : 8;
constexpr int rows_in_flight(int m) {
  return kRegisters == 16 ? (m == 1 ? 4 : m == 2 ? 2 : 1) : (m == 1 ? 8 : m <= 3 ? 4 : 1);
}

template <Dtype F, int M = kPassRows>
bool stream_format(int m, int rows, int64_t kc, const uint8_t* w, int64_t ldw, const uint8_t* after, const float* a,
                   int64_t a_stride, float* acc, bool first) {
  if constexpr (M > 1) {
    if (m < M) return stream_format<F, M - 1>(m, rows, kc, w, ldw, after, a, a_stride, acc, first);
  }
  return stream_rows<F, M, rows_in_flight(M)>(rows, kc, w, ldw, after, a, a_stride, acc, first);
}

bool stream(Dtype format, int m, int rows, int64_t kc, const uint8_t* w, int64_t ldw, const uint8_t* after,
            const float* a, int64_t a_stride, float* acc, bool first) {
  switch (format) {
    case Dtype::e5m2: return stream_format<Dtype::e5m2>(m, rows, kc, w, ldw, after, a, a_stride, acc, first);
    case Dtype::e4m3fnuz: return stream_format<Dtype::e4m3fnuz>(m, rows, kc, w, ldw, after, a, a_stride, acc, first);
    default: return stream_format<Dtype::e4m3fn>(m, rows, kc, w, ldw, after, a, a_stride, acc, first);
  }
}

// Vector j of every 4W elements takes the elements 4i + j: the order in which Decode yields weights.
void permute(const float* src, int64_t n, float* dst) {
  for (int64_t k = 0; k < n; k += 4 * W)
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < W; ++i) dst[k + j * W + i] = src[k + 4 * i + j];
}

void reduce(const float* acc, int64_t count, float* sums) {
  for (int64_t i = 0; i < count; ++i) sums[i] = reduce_add(add(load(acc + 2 * i * W), load(acc + (2 * i + 1) * W)));
}

constexpr Stream stream_up_to(int max_m) { return {max_m, kPassRows, stream, permute, reduce}; }

}  // namespace
}  // namespace moekern::cpu
