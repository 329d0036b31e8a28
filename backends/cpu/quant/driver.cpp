#include "cpu/quant/driver.h"

#include <algorithm>

#include "cpu/gemm/operands.h"
#include "cpu/parallel.h"
#include "moekern/float_formats.h"

namespace moekern::cpu {
namespace {

void load_row(const RowOps& rows, const Matrix& x, int64_t i, int64_t j, int64_t n, float* dst) {
  if (x.col_stride == 1) return rows.load(x.dtype, x.at(i, j), n, dst);
  for (int64_t q = 0; q < n; ++q) dst[q] = element(x, i, j + q);
}

// A row of a cast's input: where it lies if it is contiguous, else gathered to f32.
struct Row {
  Dtype dtype;
  const char* data;
};

struct PlainInput {
  const RowOps& rows;
  const Matrix& x;
  Row row(int64_t i, int64_t j, int64_t n) const {
    if (x.col_stride == 1) return {x.dtype, x.at(i, j)};
    float* values = scratch_of<float>(Slot::row, n);
    load_row(rows, x, i, j, n, values);
    return {Dtype::f32, reinterpret_cast<const char*>(values)};
  }
  const char* memory(int64_t i, int64_t j) const { return x.at(i, j); }
};

// silu(gate) * up, computed anew for each pass over a block: it is cheaper than a buffer for it.
struct GatedInput {
  const RowOps& rows;
  const Matrix& x;
  Row row(int64_t i, int64_t j, int64_t n) const {
    float* gate = scratch_of<float>(Slot::row, 2 * n);
    float* up = gate + n;
    load_row(rows, x, i, j, n, gate);
    load_row(rows, x, i, x.cols / 2 + j, n, up);
    rows.silu_mul(gate, up, n, gate);
    return {Dtype::f32, reinterpret_cast<const char*>(gate)};
  }
  const char* memory(int64_t i, int64_t j) const { return x.at(i, j); }
};

// A row of blocks is cast in panels, so that what the second pass reads is still in L1 (one row) or L2 (128).
struct Panels {
  int64_t height, width, across, count;
  Panels(const Matrix& q, int64_t rows) : height(rows) {
    const int64_t wanted = height == 1 ? 2048 : 512;
    width = std::max<int64_t>(round_up(ceil_div(q.cols, ceil_div(q.cols, wanted)), 128), 1);
    across = ceil_div(q.cols, width);
    count = ceil_div(q.rows, height) * across;
  }
  int64_t row(int64_t t) const { return t / across * height; }
  int64_t col(int64_t t) const { return t % across * width; }
};

// Whether codes bypass the caches: a store that does not saves reading the line it writes to. Less than this
// may still be in a cache when the next op wants it.
bool past_caches(const Matrix& q) {
  constexpr int64_t kBytes = 4 << 20;
  const bool aligned = (reinterpret_cast<uintptr_t>(q.data) | static_cast<uintptr_t>(q.row_stride)) % 64 == 0;
  return aligned && q.col_stride == 1 && q.rows * q.cols >= kBytes;
}

// Twice over a panel, row by row, in the order of memory.
template <class Input>
void cast_panel(const RowOps& rows, const CastProblem& p, const Panels& panels, int64_t t, const Input& input,
                bool past_caches) {
  const int64_t i0 = panels.row(t), i1 = std::min(i0 + panels.height, p.q.rows);
  const int64_t j0 = panels.col(t), n = std::min(panels.width, p.q.cols - j0);
  const int64_t block = p.scale.block_cols, blocks = ceil_div(n, block), room = round_up(blocks, 16);
  float* amax = scratch_of<float>(Slot::own_b, 4 * room);
  float *scale = amax + room, *inverse = scale + room, *normal_from = inverse + room;
  std::fill_n(amax, room, 0.f);
  Row row{};
  for (int64_t i = i0; i < i1; ++i) {
    row = input.row(i, j0, n);
    rows.amax(row.dtype, row.data, n, block, amax);
  }
  const bool bounded = rows.block_scales(amax, blocks, p.q.dtype, p.round_scale_up, scale, inverse, normal_from);
  for (int64_t b = 0; b < blocks; ++b)
    *reinterpret_cast<float*>(p.scale.values.at(i0 / p.scale.block_rows, j0 / block + b)) = scale[b];
  const int64_t after = std::min(t + 1, panels.count - 1);
  for (int64_t i = i0; i < i1; ++i) {
    if (i1 - i0 > 1) row = input.row(i, j0, n);
    const char* next = input.memory(std::min(panels.row(after) + i - i0, p.q.rows - 1), panels.col(after));
    rows.quantize(row.dtype, row.data, {block, inverse, normal_from, bounded}, n, p.q.dtype,
                  reinterpret_cast<uint8_t*>(p.q.at(i, j0)), next, past_caches);
  }
}

template <class Input>
void cast(const RowOps& rows, const CastProblem& p, const Input& input) {
  const Panels panels(p.q, p.scale.block_rows);
  const bool past = past_caches(p.q);
  // About 64 Ki elements a task: long enough to hide handing it out, short enough to balance.
  const int64_t per_task = std::max<int64_t>((64 << 10) / (panels.width * panels.height), 1);
  parallel_for(p.threads, ceil_div(panels.count, per_task), [&](int64_t task) {
    for (int64_t t = task * per_task; t < std::min((task + 1) * per_task, panels.count); ++t)
      cast_panel(rows, p, panels, t, input, past);
    if (past) __atomic_thread_fence(__ATOMIC_SEQ_CST);  // before another thread may see the codes
  });
}

}  // namespace

void cast_to_fp8(const RowOps& rows, const CastProblem& p) { cast(rows, p, PlainInput{rows, p.x}); }

void silu_mul_cast_to_fp8(const RowOps& rows, const CastProblem& p) { cast(rows, p, GatedInput{rows, p.x}); }

void dequantize(const RowOps& rows, const CastProblem& p) {
  constexpr int64_t kRowsPerTask = 16;
  parallel_for(p.threads, ceil_div(p.q.rows, kRowsPerTask), [&](int64_t task) {
    float* values = scratch_of<float>(Slot::row, p.q.cols);
    for (int64_t i = task * kRowsPerTask; i < std::min((task + 1) * kRowsPerTask, p.q.rows); ++i) {
      load_row(rows, p.q, i, 0, p.q.cols, values);
      for (int64_t j = 0; j < p.q.cols; j += p.scale.block_cols)
        rows.scale(values + j, scale_of(p.scale, i, j), std::min(p.scale.block_cols, p.q.cols - j), values + j);
      rows.store(p.x.dtype, values, p.q.cols, p.x.at(i, 0));
    }
  });
}

}  // namespace moekern::cpu
