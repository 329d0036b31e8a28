// The streaming GEMM: for few activation rows, where reading the weights is most of the work.
//
//   activations normalised to f32 and permuted once
//   parallel over blocks of weight rows            within one row of the weights' scale grid
//     for each piece of k, of each pass of activation rows, that fits L1
//       activations times that row of scales       so the inner loop has no scale in it
//       stream (gemm/stream.h)
#include "cpu/gemm/streamed.h"

#include <algorithm>
#include <cstring>

#include "cpu/gemm/driver.h"
#include "cpu/parallel.h"
#include "moekern/float_formats.h"

namespace moekern::cpu {
namespace {

// Weight rows to a task: all of a row of scales, but for small products.
constexpr int64_t kMinTaskRows = 16, kMaxTaskRows = 128;
constexpr int64_t kPieceBytes = 24 << 10;  // of activations, in an L1 of 32 KiB or more

struct Pieces {
  int64_t count, size;  // of k; size is a multiple of 128
  Pieces(const Stream& stream, int64_t m, int64_t k) {
    const int64_t bytes = std::min<int64_t>(m, stream.pass_rows) * size_of(stream.panel);
    const int64_t longest = std::max<int64_t>(kPieceBytes / bytes / kBlock, 1) * kBlock;
    size = round_up(ceil_div(k, ceil_div(k, longest)), kBlock);
    count = ceil_div(k, size);
  }
};

// Scales that vary along k go into the activations; others are applied to the sums.
bool scale_in_a(const GemmProblem& p) { return p.sb.values && p.sb.block_cols < p.k(); }

// A row of weights with a NaN or an infinity in it, in plain arithmetic.
float plain_dot(const GemmProblem& p, int64_t i, int64_t j) {
  double sum = 0;
  for (int64_t q = 0; q < p.k(); ++q)
    sum += static_cast<double>(element(p.a, i, q)) * scale_of(p.sa, i, q) *
           (static_cast<double>(element(p.b, j, q)) * scale_of(p.sb, j, q));
  return static_cast<float>(sum);
}

// scales[kb] of one row of the weights' scale grid, and for bf16 activations row_scales[i][kb], theirs included: f32
// ones contain theirs. The exponent of what was taken out is returned.
struct Scales {
  float* weights;
  float* rows;
  int exponent;
};

Scales scales_of(const GemmProblem& p, const StreamedActivations& a, int64_t j0) {
  const int64_t m = p.m(), blocks = ceil_div(p.k(), kBlock);
  float* weights = scratch_of<float>(Slot::row, blocks * (m + 1));
  float* rows = weights + blocks;
  const bool scaled = scale_in_a(p);
  const int exponent = normalised_scales(scaled ? p.sb : ScaleGrid{}, scaled ? j0 : 0, blocks, weights, 1);
  if (a.row_scales)
    for (int64_t i = 0; i < m; ++i)
      for (int64_t kb = 0; kb < blocks; ++kb)
        rows[i * blocks + kb] = a.row_scales[a.row(i) * (a.k_padded / kBlock) + kb] * weights[kb];
  return {weights, rows, exponent};
}

// Columns [k, k + kc) of rows [first, end), `stride` values apart: f32 times the scales, bf16 as they are.
void gather_piece(const GemmIsa& isa, const StreamedActivations& a, const Scales& scales, int64_t first, int64_t end,
                  int64_t k, int64_t kc, int64_t stride, char* to) {
  const int64_t size = size_of(isa.stream->panel);
  for (int64_t i = first; i < end; ++i, to += stride * size) {
    const char* from = a.values + (a.row(i) * a.k_padded + k) * size;
    if (a.row_scales) {
      std::memcpy(to, from, static_cast<size_t>(round_up(kc, kBlock) * size));
      continue;
    }
    for (int64_t q = 0; q < kc; q += kBlock)
      isa.rows->scale(reinterpret_cast<const float*>(from) + q, scales.weights[(k + q) / kBlock], kBlock,
                      reinterpret_cast<float*>(to) + q);
  }
}

// Columns [j0, j0 + cols) of the product, whose weights share a row of scales.
void grid_row_block(const GemmIsa& isa, const GemmProblem& p, const StreamedActivations& a, int64_t j0, int64_t cols,
                    const char* next, float* sums, int64_t ld) {
  const int64_t m = p.m(), passes = ceil_div(m, isa.stream->pass_rows), k_blocks = ceil_div(p.k(), kBlock);
  const Pieces pieces(*isa.stream, m, p.k());
  const Scales scales = scales_of(p, a, j0);
  char* piece_of_a = scratch_of<char>(Slot::own_a, ceil_div(m, passes) * pieces.size * size_of(isa.stream->panel));
  float* acc = scratch_of<float>(Slot::own_c, cols * m * isa.lanes);
  const auto* w = reinterpret_cast<const uint8_t*>(p.b.at(j0, 0));
  bool special = false;
  for (int64_t piece = 0; piece < pieces.count; ++piece) {
    const int64_t k = piece * pieces.size, kc = std::min(pieces.size, p.k() - k);
    const int64_t ahead = piece + 1 < pieces.count ? pieces.size : next - p.b.at(j0, k);
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t first = m * pass / passes, end = m * (pass + 1) / passes;
      gather_piece(isa, a, scales, first, end, k, kc, pieces.size, piece_of_a);
      special |=
          isa.stream->run(p.b.dtype, static_cast<int>(end - first), static_cast<int>(cols), kc, w + k, p.b.row_stride,
                          pass ? 0 : ahead, piece_of_a, pieces.size, scales.rows + first * k_blocks + k / kBlock,
                          k_blocks, acc + first * cols * isa.lanes, piece == 0);
    }
  }
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t i = m * pass / passes, end = m * (pass + 1) / passes;
    isa.stream->reduce(acc + i * cols * isa.lanes, static_cast<int>(end - i), static_cast<int>(cols), sums + i * ld,
                       ld);
  }
  for (int64_t i = 0; i < m; ++i) {
    float* row = sums + i * ld;
    if (!scale_in_a(p))
      for (int64_t j = 0; j < cols; ++j) row[j] *= scale_of(p.sb, j0 + j, 0);
    const int e = a.exponents[a.row(i)];
    scale_by_power(*isa.rows, row, cols, (a.row_scales ? e : result_exponent_f32(p.b.dtype, e)) + scales.exponent);
    if (special)
      for (int64_t j = 0; j < cols; ++j) row[j] = plain_dot(p, p.a_row(i), j0 + j);
  }
}

}  // namespace

const char* stream_refuses(const GemmIsa& isa, const GemmProblem& p) {
  if (p.m() > isa.stream->max_m) return "a has too many rows: streaming the weights pays for few only";
  if (p.k() == 0) return "k is 0: there are no weights to stream";
  if (const char* reason = panel_refuses(isa.stream->panel, p)) return reason;
  if (p.b.col_stride != 1) return "b must be contiguous along k";
  if (scale_in_a(p) && (p.sb.block_cols % kBlock != 0 || (p.sb.block_rows < 8 && p.sb.block_rows < p.n())))
    return "the scale blocks of b must be at least 8 rows high and a multiple of 128 wide, or as wide as k";
  return nullptr;
}

int64_t streamed_bytes(const GemmIsa& isa, int64_t rows, int64_t k) {
  const int64_t k_padded = round_up(k, kBlock), scales = isa.stream->panel == Dtype::bf16 ? k_padded / kBlock : 0;
  return rows * (k_padded * size_of(isa.stream->panel) + (scales + 1) * static_cast<int64_t>(sizeof(float)));
}

StreamedActivations streamed_activations(const GemmIsa& isa, int64_t rows, int64_t k, char* memory) {
  const int64_t k_padded = round_up(k, kBlock),
                scales = isa.stream->panel == Dtype::bf16 ? rows * k_padded / kBlock : 0;
  auto* after = reinterpret_cast<float*>(memory + rows * k_padded * size_of(isa.stream->panel));
  return {memory, scales ? after : nullptr, reinterpret_cast<int*>(after + scales), k_padded, nullptr};
}

void stream_activations(const GemmIsa& isa, const GemmProblem& p, int64_t i, const StreamedActivations& a,
                        int64_t row) {
  const bool f32 = !a.row_scales;
  const int64_t from = p.a_row(i), blocks = a.k_padded / kBlock;
  float* plain = scratch_of<float>(Slot::row, a.k_padded + isa.lanes);
  a.exponents[row] = normalised_row(*isa.rows, p, from, f32, f32 ? kTopF32 : 0, a.k_padded, plain);
  isa.stream->permute(plain, a.k_padded, a.values + row * a.k_padded * size_of(isa.stream->panel));
  if (!f32) a.exponents[row] += normalised_scales(p.sa, from, ceil_div(p.k(), kBlock), a.row_scales + row * blocks, 1);
}

int64_t streamed_task_rows(int64_t n, int threads) {
  // The time in rows: what a task costs besides its own is that of 8, and threads that are not equally fast wait for
  // half a task in the end.
  const auto cost = [&](int64_t rows) {
    return ceil_div(ceil_div(n, rows), static_cast<int64_t>(threads)) * (rows + 8) + rows / 2;
  };
  int64_t best = kMaxTaskRows;
  for (int64_t rows = kMaxTaskRows; rows >= kMinTaskRows; rows /= 2)
    if (cost(rows) < cost(best)) best = rows;
  return best;
}

void streamed_block(const GemmIsa& isa, const GemmProblem& p, const StreamedActivations& a, int64_t j0, int64_t cols,
                    const char* next, float* sums, int64_t ld) {
  if (!scale_in_a(p)) return grid_row_block(isa, p, a, j0, cols, next, sums, ld);
  for (int64_t j = j0, end; j < j0 + cols; j = end) {
    end = std::min(j0 + cols, (j / p.sb.block_rows + 1) * p.sb.block_rows);
    grid_row_block(isa, p, a, j, end - j, end < j0 + cols ? p.b.at(end, 0) : next, sums + j - j0, ld);
  }
}

void gemm_streamed(const GemmIsa& isa, const GemmProblem& p) {
  const StreamedActivations a =
      streamed_activations(isa, p.m(), p.k(), scratch_of<char>(Slot::shared_a, streamed_bytes(isa, p.m(), p.k())));
  // A row takes a nanosecond or so per element; less than 64 Ki of them are not worth waking threads for.
  parallel_for(p.m() * a.k_padded < 64 << 10 ? 1 : p.threads, p.m(),
               [&](int64_t i) { stream_activations(isa, p, i, a, i); });
  const int64_t rows = streamed_task_rows(p.n(), p.threads);
  parallel_for(p.threads, ceil_div(p.n(), rows), [&](int64_t task) {
    const int64_t j0 = task * rows, cols = std::min(rows, p.n() - j0);
    float* sums = scratch_of<float>(Slot::own_b, p.m() * cols);
    streamed_block(isa, p, a, j0, cols, p.b.at(j0 + rows, 0), sums, cols);
    for (int64_t i = 0; i < p.m(); ++i) write_row(*isa.rows, p, i, j0, cols, sums + i * cols);
  });
}

}  // namespace moekern::cpu
