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

// Where a panel's rows lie: in x itself, or in scratch memory as f32.
struct Source {
  Dtype dtype;
  const char* data;
  int64_t stride;    // bytes from row to row
  const char* next;  // the next panel; data itself where nothing is gained by reading ahead
};

struct Panel {
  int64_t i0, rows, j0, cols;
};

struct PlainInput {
  static constexpr bool kInPlace = true;
  const RowOps& rows;
  const Matrix& x;
  Source source(const Panel& p, const Panel& next) const {
    const int64_t stride = x.row_stride * size_of(x.dtype);
    if (x.col_stride == 1) return {x.dtype, x.at(p.i0, p.j0), stride, x.at(next.i0, next.j0)};
    float* values = scratch_of<float>(Slot::own_b, p.rows * p.cols);
    for (int64_t i = 0; i < p.rows; ++i) load_row(rows, x, p.i0 + i, p.j0, p.cols, values + i * p.cols);
    const auto* data = reinterpret_cast<const char*>(values);
    return {Dtype::f32, data, p.cols * int64_t{sizeof(float)}, data};
  }
};

// silu(gate) * up
struct GatedInput {
  static constexpr bool kInPlace = false;
  const RowOps& rows;
  const Matrix& x;
  Source source(const Panel& p, const Panel& next) const {
    float* y = scratch_of<float>(Slot::own_b, 3 * p.cols);
    const char *gate = x.at(p.i0, p.j0), *up = x.at(p.i0, x.cols / 2 + p.j0);
    Dtype dtype = x.dtype;
    int64_t ahead = x.at(next.i0, next.j0) - gate;
    if (x.col_stride != 1) {
      float *gates = y + p.cols, *ups = gates + p.cols;
      load_row(rows, x, p.i0, p.j0, p.cols, gates);
      load_row(rows, x, p.i0, x.cols / 2 + p.j0, p.cols, ups);
      gate = reinterpret_cast<const char*>(gates);
      up = reinterpret_cast<const char*>(ups);
      dtype = Dtype::f32;
      ahead = 0;
    }
    rows.gated(Gating{}, dtype, gate, up, p.cols, y, ahead);
    const auto* data = reinterpret_cast<const char*>(y);
    return {Dtype::f32, data, 0, data};
  }
};

// Whether an output bypasses the caches: a store that does not saves reading the line it writes to. Less than
// this may still be in a cache when the next op wants it.
bool past_caches(const Matrix& out) {
  constexpr int64_t kBytes = 4 << 20;
  const int64_t stride = out.row_stride * size_of(out.dtype);
  const bool aligned = (reinterpret_cast<uintptr_t>(out.data) | static_cast<uintptr_t>(stride)) % 64 == 0;
  return aligned && out.rows * out.cols * size_of(out.dtype) >= kBytes;
}

// Before another thread may see what was written so.
void settle(bool past_caches) {
  if (past_caches) __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

// Columns at a time: what is read twice stays in L1 meanwhile, or in L2 where blocks are 128 rows tall, beside what is
// next.
int64_t width_of(int64_t cols, int64_t widest) { return round_up(ceil_div(cols, ceil_div(cols, widest)), kBlock); }

template <class Input>
void cast(const RowOps& rows, const CastProblem& p, const Input& input) {
  const int64_t height = p.scale.block_rows;
  const int64_t width = width_of(p.q.cols, height == 1 ? kWidestRow : kWidestPanel);
  const int64_t cols = height == 1 && Input::kInPlace ? p.q.cols : width, across = ceil_div(p.q.cols, cols);
  const int64_t total = ceil_div(p.q.rows, height) * across;
  const bool past = past_caches(p.q);
  const auto panel = [&](int64_t t) {
    const int64_t i0 = t / across * height, j0 = t % across * cols;
    return Panel{i0, std::min(height, p.q.rows - i0), j0, std::min(cols, p.q.cols - j0)};
  };
  // About 64 Ki elements a task: long enough to hide handing it out, short enough to balance.
  const int64_t per_task = std::max<int64_t>((64 << 10) / (cols * height), 1);
  parallel_for(p.threads, ceil_div(total, per_task), [&](int64_t task) {
    for (int64_t t = task * per_task; t < std::min((task + 1) * per_task, total); ++t) {
      const Panel here = panel(t);
      const Source source = input.source(here, panel(std::min(t + 1, total - 1)));
      CastPanel c;
      c.x = source.data;
      c.x_stride = source.stride;
      c.rows = here.rows;
      c.cols = here.cols;
      c.width = width;
      c.by_column = p.scale.block_cols == 1;
      c.q = reinterpret_cast<uint8_t*>(p.q.at(here.i0, here.j0));
      c.q_stride = p.q.row_stride;
      c.scale = reinterpret_cast<float*>(p.scale.values.at(here.i0 / height, here.j0 / p.scale.block_cols));
      c.scale_stride = p.scale.values.col_stride;
      c.round_scale_up = p.round_scale_up;
      c.next = source.next;
      c.past_caches = past;
      rows.cast_panel(source.dtype, p.q.dtype, c);
    }
    settle(past);
  });
}

}  // namespace

void cast_to_fp8(const RowOps& rows, const CastProblem& p) { cast(rows, p, PlainInput{rows, p.x}); }

void cast_row(const RowOps& rows, const Matrix& x, int64_t i, bool round_scale_up, Dtype format, uint8_t* q,
              float* scale) {
  if (x.cols == 0) return;
  const Source source = PlainInput{rows, x}.source({i, 1, 0, x.cols}, {std::min(i + 1, x.rows - 1), 1, 0, x.cols});
  rows.cast_panel(source.dtype, format,
                  {source.data, source.stride, 1, x.cols, width_of(x.cols, kWidestRow), false, q, x.cols, scale, 1,
                   round_scale_up, source.next, false});
}

void silu_mul_cast_to_fp8(const RowOps& rows, const CastProblem& p) { cast(rows, p, GatedInput{rows, p.x}); }

void dequantize(const RowOps& rows, const CastProblem& p) {
  constexpr int64_t kRowsPerTask = 16;
  const int64_t cols = p.q.cols, block = std::min(p.scale.block_cols, cols), blocks = ceil_div(cols, block);
  const bool past = past_caches(p.x);
  parallel_for(p.threads, ceil_div(p.q.rows, kRowsPerTask), [&](int64_t task) {
    float* scales = scratch_of<float>(Slot::row, blocks);
    auto* codes = scratch_of<uint8_t>(Slot::own_b, cols);
    int64_t scales_row = -1;
    bool finite = true;
    for (int64_t i = task * kRowsPerTask; i < std::min((task + 1) * kRowsPerTask, p.q.rows); ++i) {
      if (i / p.scale.block_rows != scales_row) {
        scales_row = i / p.scale.block_rows;
        finite = true;
        for (int64_t b = 0; b < blocks; ++b) {
          scales[b] = scale_of(p.scale, i, b * block);
          finite &= scales[b] - scales[b] == 0.f;
        }
      }
      const auto* x = reinterpret_cast<const uint8_t*>(p.q.at(i, 0));
      if (p.q.col_stride != 1) {
        for (int64_t j = 0; j < cols; ++j) codes[j] = x[j * p.q.col_stride];
        x = codes;
      }
      rows.dequantize(p.q.dtype, p.x.dtype, x, scales, block, finite, cols, p.x.at(i, 0), past);
    }
    settle(past);
  });
}

}  // namespace moekern::cpu
