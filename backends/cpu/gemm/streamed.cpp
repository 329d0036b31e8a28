// The streaming GEMM: for few activation rows, where reading the weights is most of the work.
//
//   activations normalised to f32 and permuted once
//   parallel over blocks of weight rows            within one row of the weights' scale grid
//     activations times that row of scales         so the inner loop has no scale in it
//     for each piece of k whose activations fit L1
//       for each pass of activation rows           stream (gemm/stream.h)
#include "cpu/gemm/streamed.h"

#include <algorithm>
#include <atomic>

#include "cpu/gemm/driver.h"
#include "cpu/parallel.h"
#include "moekern/float_formats.h"

namespace moekern::cpu {
namespace {

constexpr int64_t kMinTaskRows = 8, kMaxTaskRows = 64;
constexpr int64_t kPieceFloats = 6144;  // 24 KiB of activations, in an L1 of 32 KiB or more

struct Pieces {
  int64_t count, size;  // of k; size is a multiple of 128
  Pieces(int64_t m, int64_t k, int pass_rows) {
    const int64_t longest = std::max<int64_t>(kPieceFloats / std::min<int64_t>(m, pass_rows) / kBlock, 1) * kBlock;
    size = round_up(ceil_div(k, ceil_div(k, longest)), kBlock);
    count = ceil_div(k, size);
  }
};

// Scales that vary along k go into the activations; others are applied to the sums.
bool scale_in_a(const GemmProblem& p) { return p.sb.values && p.sb.block_cols < p.k(); }

// The activations times one row of the weights' scale grid, piece-major, kept per thread for as long
// as its blocks stay in that row. `exponent` was taken out of the scales.
struct ScaledActivations {
  uint64_t call = 0;
  const GemmProblem* problem = nullptr;
  int64_t grid_row = -1;
  int exponent = 0;
  float* values = nullptr;
};

// Two of them: a gate's and an up's blocks alternate.
const ScaledActivations& rescaled(const GemmIsa& isa, const GemmProblem& p, const StreamedActivations& a,
                                  const Pieces& pieces, uint64_t call, int64_t grid_row) {
  static thread_local ScaledActivations kept[2];
  static thread_local int last = 0;
  const auto wanted = [&](const ScaledActivations& s) {
    return s.call == call && s.problem == &p && s.grid_row == grid_row;
  };
  for (const ScaledActivations& s : kept)
    if (wanted(s)) return s;
  last = 1 - last;
  ScaledActivations& own = kept[last];
  const int64_t m = p.m(), blocks = ceil_div(p.k(), kBlock);
  own.call = call;
  own.problem = &p;
  own.grid_row = grid_row;
  own.values = scratch_of<float>(last ? Slot::own_a : Slot::other_a, m * pieces.count * pieces.size);
  float* scales = scratch_of<float>(Slot::row, blocks);
  own.exponent = normalised_scales(scale_in_a(p) ? p.sb : ScaleGrid{}, grid_row * p.sb.block_rows, blocks, scales, 1);
  for (int64_t kb = 0; kb < blocks; ++kb) {
    const int64_t piece = kb * kBlock / pieces.size, offset = kb * kBlock - piece * pieces.size;
    for (int64_t i = 0; i < m; ++i)
      isa.rows->scale(a.values + p.a_row(i) * a.k_padded + kb * kBlock, scales[kb], kBlock,
                      own.values + (piece * m + i) * pieces.size + offset);
  }
  return own;
}

// A row of weights with a NaN or an infinity in it, in plain arithmetic.
float plain_dot(const GemmProblem& p, int64_t i, int64_t j) {
  double sum = 0;
  for (int64_t q = 0; q < p.k(); ++q)
    sum += static_cast<double>(element(p.a, i, q)) * scale_of(p.sa, i, q) *
           (static_cast<double>(element(p.b, j, q)) * scale_of(p.sb, j, q));
  return static_cast<float>(sum);
}

// Columns [j0, j0 + cols) of the product, whose weights share a row of scales.
void grid_row_block(const GemmIsa& isa, const GemmProblem& p, const StreamedActivations& a, const Pieces& pieces,
                    uint64_t call, int64_t grid_row, int64_t j0, int64_t cols, const char* next, float* sums,
                    int64_t ld) {
  const int64_t m = p.m(), passes = ceil_div(m, isa.stream->pass_rows);
  const ScaledActivations& own = rescaled(isa, p, a, pieces, call, grid_row);
  float* acc = scratch_of<float>(Slot::own_c, cols * m * (isa.lanes + 1));
  float* dots = acc + cols * m * isa.lanes;
  const auto* w = reinterpret_cast<const uint8_t*>(p.b.at(j0, 0));
  bool special = false;
  for (int64_t piece = 0; piece < pieces.count; ++piece) {
    const int64_t k = piece * pieces.size, kc = std::min(pieces.size, p.k() - k);
    const int64_t ahead = piece + 1 < pieces.count ? pieces.size : next - p.b.at(j0, k);
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t i = m * pass / passes, end = m * (pass + 1) / passes;
      special |= isa.stream->run(p.b.dtype, static_cast<int>(end - i), static_cast<int>(cols), kc, w + k,
                                 p.b.row_stride, pass ? 0 : ahead, own.values + (piece * m + i) * pieces.size,
                                 pieces.size, acc + i * cols * isa.lanes, piece == 0);
    }
  }
  isa.stream->reduce(acc, cols * m, dots);
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t first = m * pass / passes, height = m * (pass + 1) / passes - first;
    for (int64_t i = first; i < first + height; ++i) {
      float* row = sums + i * ld;
      for (int64_t j = 0; j < cols; ++j) row[j] = dots[first * cols + j * height + i - first];
      if (!scale_in_a(p))
        for (int64_t j = 0; j < cols; ++j) row[j] *= scale_of(p.sb, j0 + j, 0);
      scale_by_power(*isa.rows, row, cols, result_exponent_f32(p.b.dtype, a.exponents[p.a_row(i)]) + own.exponent);
      if (special)
        for (int64_t j = 0; j < cols; ++j) row[j] = plain_dot(p, p.a_row(i), j0 + j);
    }
  }
}

}  // namespace

const char* stream_refuses(const GemmIsa& isa, const GemmProblem& p) {
  if (p.m() > isa.stream->max_m) return "a has too many rows: streaming the weights pays for few only";
  if (p.k() == 0) return "k is 0: there are no weights to stream";
  if (p.b.col_stride != 1) return "b must be contiguous along k";
  if (scale_in_a(p) && (p.sb.block_cols % kBlock != 0 || (p.sb.block_rows < kMinTaskRows && p.sb.block_rows < p.n())))
    return "the scale blocks of b must be at least 8 rows high and a multiple of 128 wide, or as wide as k";
  return nullptr;
}

uint64_t new_call() {
  static std::atomic<uint64_t> calls{0};
  return ++calls;
}

StreamedActivations streamed_activations(const GemmIsa& isa, const GemmProblem& p) {
  const int64_t rows = p.a.rows, k_padded = round_up(p.k(), kBlock);
  float* values = scratch_of<float>(Slot::shared_a, rows * (k_padded + 1));
  const StreamedActivations a{values, reinterpret_cast<int*>(values + rows * k_padded), k_padded};
  // A row takes a nanosecond or so per element; less than 64 Ki of them are not worth waking threads for.
  const int threads = rows * k_padded < 64 << 10 ? 1 : p.threads;
  parallel_for(threads, rows, [&](int64_t i) {
    float* plain = scratch_of<float>(Slot::row, k_padded);
    a.exponents[i] = normalised_row(*isa.rows, p, i, true, kTopF32, k_padded, plain);
    isa.stream->permute(plain, k_padded, a.values + i * k_padded);
  });
  return a;
}

int64_t streamed_task_rows(const GemmIsa& isa, const GemmProblem& p) {
  // What a thread computes with and what it prefetches: half of the smallest L2 at most. Accumulators, which
  // every piece reads and writes once: half of the smallest L1.
  constexpr int64_t kWeightBytes = 256 << 10, kAccumulatorBytes = 16 << 10;
  const int64_t accumulators = p.m() * isa.lanes * static_cast<int64_t>(sizeof(float));
  int64_t rows = kMaxTaskRows;
  while (rows > kMinTaskRows && (rows * p.k() > kWeightBytes || rows * accumulators > kAccumulatorBytes)) rows /= 2;
  return rows;
}

void streamed_block(const GemmIsa& isa, const GemmProblem& p, const StreamedActivations& a, uint64_t call, int64_t j0,
                    int64_t cols, const char* next, float* sums, int64_t ld) {
  const Pieces pieces(p.m(), p.k(), isa.stream->pass_rows);
  if (!scale_in_a(p)) return grid_row_block(isa, p, a, pieces, call, 0, j0, cols, next, sums, ld);
  for (int64_t j = j0, end; j < j0 + cols; j = end) {
    const int64_t grid_row = j / p.sb.block_rows;
    end = std::min(j0 + cols, (grid_row + 1) * p.sb.block_rows);
    grid_row_block(isa, p, a, pieces, call, grid_row, j, end - j, end < j0 + cols ? p.b.at(end, 0) : next,
                   sums + j - j0, ld);
  }
}

void gemm_streamed(const GemmIsa& isa, const GemmProblem& p) {
  const uint64_t call = new_call();
  const StreamedActivations a = streamed_activations(isa, p);
  const int64_t rows = streamed_task_rows(isa, p);
  parallel_for(p.threads, ceil_div(p.n(), rows), [&](int64_t task) {
    const int64_t j0 = task * rows, cols = std::min(rows, p.n() - j0);
    float* sums = scratch_of<float>(Slot::own_b, p.m() * cols);
    streamed_block(isa, p, a, call, j0, cols, p.b.at(j0 + rows, 0), sums, cols);
    for (int64_t i = 0; i < p.m(); ++i) write_row(*isa.rows, p, i, j0, cols, sums + i * cols);
  });
}

}  // namespace moekern::cpu
