#include "cpu/quant/driver.h"

#include <algorithm>
#include <cmath>

#include "cpu/gemm/operands.h"
#include "moekern/float_formats.h"
#include "cpu/parallel.h"

namespace moekern::cpu {
namespace {

bool is_finite(float x) { return x - x == 0.f; }

// s = max(amax, 1e-4) / max_of(format), rounded up to a power of two on demand.
float scale_for(float amax, Dtype format, bool round_up) {
  const float s = (amax < 1e-4f ? 1e-4f : amax) / max_of(format);
  if (!round_up || !is_finite(s)) return s;
  int exponent;
  const float fraction = std::frexp(s, &exponent);  // s = fraction * 2^exponent, fraction in [1/2, 1)
  return std::ldexp(1.f, fraction == 0.5f ? exponent - 1 : exponent);
}

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
};

template <class Input>
void cast_block(const RowOps& rows, const CastProblem& p, int64_t i0, int64_t j0, const Input& input) {
  const int64_t i1 = std::min(i0 + p.scale.block_rows, p.q.rows), n = std::min(p.scale.block_cols, p.q.cols - j0);
  Row row{};
  float amax = 0.f;
  for (int64_t i = i0; i < i1; ++i) {
    row = input.row(i, j0, n);
    const float top = rows.amax(row.dtype, row.data, n);
    amax = top > amax || top != top ? top : amax;
    if (amax != amax) break;
  }
  const float s = scale_for(amax, p.q.dtype, p.round_scale_up), inverse = 1.f / s;
  *reinterpret_cast<float*>(p.scale.values.at(i0 / p.scale.block_rows, j0 / p.scale.block_cols)) = s;
  for (int64_t i = i0; i < i1; ++i) {
    if (i1 - i0 > 1) row = input.row(i, j0, n);
    rows.quantize(row.dtype, row.data, inverse, is_finite(amax), n, p.q.dtype, reinterpret_cast<uint8_t*>(p.q.at(i, j0)));
  }
}

template <class Input>
void cast_blocks(const RowOps& rows, const CastProblem& p, const Input& input) {
  const int64_t block_rows = ceil_div(p.q.rows, p.scale.block_rows);
  // About 64 Ki elements a task: long enough to hide handing it out, short enough to balance.
  const int64_t per_task = std::max<int64_t>((64 << 10) / std::max<int64_t>(p.q.cols * p.scale.block_rows, 1), 1);
  parallel_for(p.threads, ceil_div(block_rows, per_task), [&](int64_t task) {
    for (int64_t b = task * per_task; b < std::min((task + 1) * per_task, block_rows); ++b)
      for (int64_t j = 0; j < p.q.cols; j += p.scale.block_cols) cast_block(rows, p, b * p.scale.block_rows, j, input);
  });
}

// Blocks one column wide, a panel of columns at a time: row by row, so that memory is read in order.
void cast_columns(const RowOps& rows, const CastProblem& p) {
  constexpr int64_t kPanel = 512;
  const int64_t panels = ceil_div(p.q.cols, kPanel), block_rows = ceil_div(p.q.rows, p.scale.block_rows);
  parallel_for(p.threads, panels * block_rows, [&](int64_t task) {
    const int64_t block = task / panels, j0 = task % panels * kPanel, n = std::min(kPanel, p.q.cols - j0);
    const int64_t i0 = block * p.scale.block_rows, i1 = std::min(i0 + p.scale.block_rows, p.q.rows);
    float values[kPanel], amax[kPanel] = {}, inverse[kPanel];
    for (int64_t i = i0; i < i1; ++i) {
      load_row(rows, p.x, i, j0, n, values);
      rows.amax_each(values, n, amax);
    }
    bool bounded = true;
    for (int64_t j = 0; j < n; ++j) {
      const float s = scale_for(amax[j], p.q.dtype, p.round_scale_up);
      *reinterpret_cast<float*>(p.scale.values.at(block, j0 + j)) = s;
      inverse[j] = 1.f / s;
      bounded &= is_finite(amax[j]);
    }
    for (int64_t i = i0; i < i1; ++i) {
      load_row(rows, p.x, i, j0, n, values);
      rows.multiply(values, inverse, n, values);
      rows.quantize(Dtype::f32, reinterpret_cast<const char*>(values), 1.f, bounded, n, p.q.dtype,
                    reinterpret_cast<uint8_t*>(p.q.at(i, j0)));
    }
  });
}

}  // namespace

void cast_to_fp8(const RowOps& rows, const CastProblem& p) {
  if (p.scale.block_cols == 1) return cast_columns(rows, p);
  cast_blocks(rows, p, PlainInput{rows, p.x});
}

void silu_mul_cast_to_fp8(const RowOps& rows, const CastProblem& p) { cast_blocks(rows, p, GatedInput{rows, p.x}); }

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
