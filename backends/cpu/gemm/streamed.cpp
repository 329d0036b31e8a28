// The streaming GEMM: for few activation rows, where reading the weights is most of the work.
//
//   activations normalised to f32 and permuted once
//   parallel over at most 64 weight rows           one row of the weights' scale grid at a time
//     activations times that row of scales         so the inner loop has no scale in it
//     for each piece of k whose activations fit L1
//       for each pass of activation rows           stream (gemm/stream.h)
#include <algorithm>
#include <cstring>

#include "cpu/gemm/driver.h"
#include "cpu/gemm/operands.h"
#include "cpu/parallel.h"
#include "moekern/float_formats.h"

namespace moekern::cpu {
namespace {

constexpr int64_t kMinTaskRows = 8;
constexpr int kMaxRows = 16;            // no ISA's Stream::max_m is larger
constexpr int64_t kPieceFloats = 6144;  // 24 KiB of activations, in an L1 of 32 KiB or more

struct Pieces {
  int64_t count, size;  // of k; size is a multiple of 128
  explicit Pieces(int64_t m, int64_t k, int pass_rows) {
    const int64_t longest = std::max<int64_t>(kPieceFloats / std::min<int64_t>(m, pass_rows) / kBlock, 1) * kBlock;
    size = round_up(ceil_div(k, ceil_div(k, longest)), kBlock);
    count = ceil_div(k, size);
  }
};

// Weight rows a task takes: as many as keep their accumulators, which every piece reads and writes
// once, to half of the smallest L1; and no task straddles two rows of scales.
int64_t task_rows(const GemmIsa& isa, const GemmProblem& p, bool scale_in_a) {
  constexpr int64_t kAccumulatorBytes = 16 << 10;
  const int64_t a_row =
      std::min<int64_t>(p.m(), isa.stream->pass_rows) * 2 * isa.lanes * static_cast<int64_t>(sizeof(float));
  int64_t rows = 64;
  while (rows > kMinTaskRows && rows * a_row > kAccumulatorBytes) rows /= 2;
  while (scale_in_a && p.sb.block_rows < p.n() && p.sb.block_rows % rows != 0) rows /= 2;
  return rows;
}

struct Shared {
  const GemmIsa& isa;
  const GemmProblem& p;
  const float* a;  // [m][k_padded], normalised and permuted
  int exponents[kMaxRows];
  int64_t k_padded;
  bool scale_in_a;  // scales that vary along k; otherwise they are applied to the sums
  Pieces pieces;
};

// The activations times one row of the weights' scale grid, piece-major, kept per thread for as long
// as the tasks stay in that row. `exponent` was taken out of the scales.
struct ScaledActivations {
  uint64_t call = 0;
  int64_t grid_row = -1;
  int exponent = 0;
  float* values = nullptr;
};

void rescale(const Shared& s, uint64_t call, int64_t grid_row, ScaledActivations& own) {
  if (own.call == call && own.grid_row == grid_row) return;
  const ScaleGrid& sb = s.p.sb;
  const int64_t m = s.p.m(), k = s.p.k(), blocks = ceil_div(k, kBlock);
  own.call = call;
  own.grid_row = grid_row;
  own.values = scratch_of<float>(Slot::own_a, m * s.pieces.count * s.pieces.size);
  float* scales = scratch_of<float>(Slot::row, blocks);
  own.exponent = normalised_scales(s.scale_in_a ? sb : ScaleGrid{}, grid_row * sb.block_rows, blocks, scales, 1);
  for (int64_t kb = 0; kb < blocks; ++kb) {
    const int64_t piece = kb * kBlock / s.pieces.size, offset = kb * kBlock - piece * s.pieces.size;
    for (int64_t i = 0; i < m; ++i)
      s.isa.rows->scale(s.a + i * s.k_padded + kb * kBlock, scales[kb], kBlock,
                        own.values + (piece * m + i) * s.pieces.size + offset);
  }
}

// A row of weights with a NaN or an infinity in it, in plain arithmetic.
float plain_dot(const GemmProblem& p, int64_t i, int64_t j) {
  double sum = 0;
  for (int64_t q = 0; q < p.k(); ++q)
    sum += static_cast<double>(element(p.a, i, q)) * scale_of(p.sa, i, q) *
           (static_cast<double>(element(p.b, j, q)) * scale_of(p.sb, j, q));
  return static_cast<float>(sum);
}

void run_task(const Shared& s, const ScaledActivations& own, int64_t j0, int64_t cols) {
  const GemmIsa& isa = s.isa;
  const GemmProblem& p = s.p;
  const int64_t m = p.m(), passes = ceil_div(m, isa.stream->pass_rows);
  float* acc = scratch_of<float>(Slot::own_c, cols * m * 2 * (isa.lanes + 1));
  float* sums = acc + cols * m * 2 * isa.lanes;
  float* row = sums + cols * m;
  const auto* w = reinterpret_cast<const uint8_t*>(p.b.data) + j0 * p.b.row_stride;
  bool special = false;
  for (int64_t piece = 0; piece < s.pieces.count; ++piece) {
    const int64_t k = piece * s.pieces.size, kc = std::min(s.pieces.size, p.k() - k);
    const uint8_t* next_piece = piece + 1 < s.pieces.count ? w + k + kc : w + cols * p.b.row_stride;
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t i = m * pass / passes, next = m * (pass + 1) / passes;
      special |=
          isa.stream->run(p.b.dtype, static_cast<int>(next - i), static_cast<int>(cols), kc, w + k, p.b.row_stride,
                          pass + 1 < passes ? w + k : next_piece, own.values + (piece * m + i) * s.pieces.size,
                          s.pieces.size, acc + i * cols * 2 * isa.lanes, piece == 0);
    }
  }
  isa.stream->reduce(acc, cols * m, sums);
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t first = m * pass / passes, height = m * (pass + 1) / passes - first;
    for (int64_t i = first; i < first + height; ++i) {
      for (int64_t j = 0; j < cols; ++j) {
        row[j] = sums[first * cols + j * height + i - first];
        if (!s.scale_in_a) row[j] *= scale_of(p.sb, j0 + j, 0);
      }
      int exponent = result_exponent_f32(p.b.dtype, s.exponents[i]) + own.exponent;
      if (special) {
        for (int64_t j = 0; j < cols; ++j) row[j] = plain_dot(p, i, j0 + j);
        exponent = 0;
      }
      write_row(*isa.rows, p, i, j0, cols, row, exponent);
    }
  }
}

}  // namespace

const char* stream_refuses(const GemmIsa& isa, const GemmProblem& p) {
  if (p.m() > isa.stream->max_m) return "a has too many rows: streaming the weights pays for few only";
  if (p.k() == 0) return "k is 0: there are no weights to stream";
  if (p.b.col_stride != 1) return "b must be contiguous along k";
  if (p.sb.values && p.sb.block_cols < p.k() &&
      (p.sb.block_cols % kBlock != 0 || (p.sb.block_rows % kMinTaskRows != 0 && p.sb.block_rows < p.n())))
    return "the scale blocks of b must be multiples of 8 x 128, or as wide as k";
  return nullptr;
}

void gemm_streamed(const GemmIsa& isa, const GemmProblem& p) {
  static std::atomic<uint64_t> calls{0};
  const uint64_t call = ++calls;
  const int64_t k_padded = round_up(p.k(), kBlock);
  Shared s{isa,
           p,
           nullptr,
           {},
           k_padded,
           p.sb.values && p.sb.block_cols < p.k(),
           Pieces(p.m(), p.k(), isa.stream->pass_rows)};
  float* a = scratch_of<float>(Slot::shared_a, p.m() * k_padded);
  s.a = a;
  // A row takes a nanosecond or so per element; less than 64 Ki of them are not worth waking threads for.
  const int preparing = p.m() * k_padded < 64 << 10 ? 1 : p.threads;
  parallel_for(preparing, p.m(), [&](int64_t i) {
    float* plain = scratch_of<float>(Slot::own_a, k_padded);
    s.exponents[i] = normalised_row(*isa.rows, p, i, true, kTopF32, k_padded, plain);
    isa.stream->permute(plain, k_padded, a + i * k_padded);
  });
  const int64_t rows = task_rows(isa, p, s.scale_in_a);
  parallel_for(p.threads, ceil_div(p.n(), rows), [&](int64_t task) {
    static thread_local ScaledActivations own;
    const int64_t j0 = task * rows;
    rescale(s, call, s.scale_in_a ? j0 / p.sb.block_rows : 0, own);
    run_task(s, own, j0, std::min(rows, p.n() - j0));
  });
}

}  // namespace moekern::cpu
