// The streaming GEMM over bf16 pairs for AVX-512 BF16 + VBMI: gemm/stream.h's loops with VDPBF16PS.
//
// Per 64 weights of a row: 1 load, 2 table lookups, 1 operation for the signs and 2 to interleave the bytes,
// then 2 M products of 32 pairs each. Scales cannot go into bf16 activations exactly: sums of 128 are multiplied by
// theirs as they join the total, one FMA to four products. 2 R M accumulators, 2 R decoded vectors and an
// activation are at most 29 of 32 registers.
#pragma once

// Included after gemm/pack_bf16.h.
#include "cpu/gemm/stream_sums.h"

namespace moekern::cpu {
namespace {

constexpr int kStep = 64, kPassRows = 6;

struct Decoder {
  const DecodeTable& table;
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
  __mmask64 nan = 0;

  // Lane l of w[h]: the weights 16 l + 8 h and the seven behind it.
  inline void operator()(const uint8_t* from, __m512bh (&w)[2]) {
    const __m512i x = load_bytes(from);
    if (table.minus_zero_is_nan) nan |= _mm512_cmpeq_epi8_mask(x, sign);
    const __m512i low = lookup(table.low, x);
    const __m512i high = _mm512_ternarylogic_epi64(lookup(table.high, x), x, sign, 0xf8);  // a | (b & c)
    w[0] = (__m512bh)_mm512_unpacklo_epi8(low, high);
    w[1] = (__m512bh)_mm512_unpackhi_epi8(low, high);
  }
};

template <int M, int R>
inline void stream_step(const uint8_t* const* w, int64_t k, const uint16_t* a, int64_t a_stride, F32 (&acc)[R][M],
                        Decoder& decode) {
  __m512bh v[R][2];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) decode(w[r] + k, v[r]);
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512bh x = (__m512bh)_mm512_loadu_si512(a + i * a_stride + k + h * 32);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r][i] = _mm512_dpbf16_ps(acc[r][i], x, v[r][h]);
    }
}

template <int M, int R>
__attribute__((noinline)) void stream_group(int64_t kc, const uint8_t* w, int64_t ldw, int64_t ahead, const uint16_t* a,
                                            int64_t a_stride, const float* scale, int64_t scale_stride, float* out,
                                            bool first, Decoder& decode) {
  F32 total[R][M];
  const uint8_t* row[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    row[r] = w + r * ldw;
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) total[r][i] = first ? zero() : load(out + (r * M + i) * W);
  }
  for (int64_t k = 0; k < kc; k += kBlock) {
    F32 acc[R][M];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(row[r] + (k + ahead), 0, 2);
      __builtin_prefetch(row[r] + (k + kStep + ahead), 0, 2);
#pragma GCC unroll 6
      for (int i = 0; i < M; ++i) acc[r][i] = zero();
    }
    if (k + kBlock <= kc) {
#pragma GCC unroll 2
      for (int step = 0; step < kBlock; step += kStep) stream_step<M, R>(row, k + step, a, a_stride, acc, decode);
    } else {  // a partial block: copied, since the bytes behind it are not ours to read
      alignas(64) uint8_t tail[R][kBlock] = {};
      const uint8_t* at[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        __builtin_memcpy(tail[r], row[r] + k, static_cast<size_t>(kc - k));
        at[r] = tail[r] - k;
      }
#pragma GCC unroll 2
      for (int step = 0; step < kBlock; step += kStep) stream_step<M, R>(at, k + step, a, a_stride, acc, decode);
    }
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) {
      const F32 s = set1(scale[i * scale_stride + k / kBlock]);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) total[r][i] = fma(acc[r][i], s, total[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) store(out + (r * M + i) * W, total[r][i]);
}

template <int M, int R>
inline void stream_rows(int rows, int64_t kc, const uint8_t* w, int64_t ldw, int64_t ahead, const uint16_t* a,
                        int64_t a_stride, const float* scale, int64_t scale_stride, float* acc, bool first,
                        Decoder& decode) {
  int r = 0;
  for (; r + R <= rows; r += R)
    stream_group<M, R>(kc, w + r * ldw, ldw, ahead, a, a_stride, scale, scale_stride, acc + r * M * W, first, decode);
  if constexpr (R > 1)
    stream_rows<M, (R + 1) / 2>(rows - r, kc, w + r * ldw, ldw, ahead, a, a_stride, scale, scale_stride,
                                acc + r * M * W, first, decode);
}

template <int M = kPassRows>
void stream_pass(int m, int rows, int64_t kc, const uint8_t* w, int64_t ldw, int64_t ahead, const uint16_t* a,
                 int64_t a_stride, const float* scale, int64_t scale_stride, float* acc, bool first, Decoder& decode) {
  if constexpr (M > 1) {
    if (m < M)
      return stream_pass<M - 1>(m, rows, kc, w, ldw, ahead, a, a_stride, scale, scale_stride, acc, first, decode);
  }
  stream_rows<M, M <= 3   ? 4
                 : M == 4 ? 3
                          : 2>(rows, kc, w, ldw, ahead, a, a_stride, scale, scale_stride, acc, first, decode);
}

bool stream(Dtype format, int m, int rows, int64_t kc, const uint8_t* w, int64_t ldw, int64_t ahead, const void* a,
            int64_t a_stride, const float* scale, int64_t scale_stride, float* acc, bool first) {
  Decoder decode{table_of(format)};
  stream_pass(m, rows, kc, w, ldw, ahead, static_cast<const uint16_t*>(a), a_stride, scale, scale_stride, acc, first,
              decode);
  return decode.nan != 0;
}

// The order in which Decoder yields weights: of every 64, the lower halves of all sixteens, then the upper ones.
void permute(const float* src, int64_t n, void* dst) {
  auto* to = static_cast<char*>(dst);
  constexpr int64_t kHalf = 8 * sizeof(uint16_t);
  for (int64_t k = 0; k < n; k += kStep, to += 2 * 4 * kHalf) {
    alignas(64) char values[2 * 4 * kHalf];
    row_store(Dtype::bf16, src + k, kStep, values);
    for (int lane = 0; lane < 4; ++lane)
      for (int h = 0; h < 2; ++h) __builtin_memcpy(to + (4 * h + lane) * kHalf, values + (2 * lane + h) * kHalf, kHalf);
  }
}

constexpr Stream stream_up_to(int max_m) { return {Dtype::bf16, max_m, kPassRows, stream, permute, reduce}; }

}  // namespace
}  // namespace moekern::cpu
