#include "cpu/quant/driver.h"

#include <algorithm>
#include <cmath>

#include "cpu/gemm/operands.h"
#include "cpu/parallel.h"
#include "moekern/float_formats.h"

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
  const char* below;  // the next row, or data again where that is no use
};

struct PlainInput {
  const RowOps& rows;
  const Matrix& x;
  Row row(int64_t i, int64_t j, int64_t n) const {
    if (x.col_stride == 1) return {x.dtype, x.at(i, j), x.at(i + 1, j)};
    float* values = scratch_of<float>(Slot::row, n);
    load_row(rows, x, i, j, n, values);
    const auto* data = reinterpret_cast<const char*>(values);
    return {Dtype::f32, data, data};
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
    rows.gated(Gating{}, gate, up, n, gate);
    const auto* data = reinterpret_cast<const char*>(gate);
    return {Dtype::f32, data, data};
  }
};

// Rows [i0, i1) of a row of blocks, columns [j0, j0 + n): twice over, row by row, in the order of memory.
template <class Input>
void cast_panel(const RowOps& rows, const CastProblem& p, int64_t i0, int64_t i1, int64_t j0, int64_t n,
                const Input& input) {
  const int64_t block = p.scale.block_cols, blocks = ceil_div(n, block);
  float* amax = scratch_of<float>(Slot::own_b, 2 * blocks);
  float* inverse = amax + blocks;
  std::fill_n(amax, blocks, 0.f);
  Row row{};
  for (int64_t i = i0; i < i1; ++i) {
    row = input.row(i, j0, n);
    rows.amax(row.dtype, row.data, n, block, amax);
  }
  bool bounded = true;
  for (int64_t b = 0; b < blocks; ++b) {
    const float s = scale_for(amax[b], p.q.dtype, p.round_scale_up);
    *reinterpret_cast<float*>(p.scale.values.at(i0 / p.scale.block_rows, j0 / block + b)) = s;
    inverse[b] = 1.f / s;
    bounded &= is_finite(amax[b]);
  }
  for (int64_t i = i0; i < i1; ++i) {
    if (i1 - i0 > 1) row = input.row(i, j0, n);
    rows.quantize(row.dtype, row.data, inverse, block, bounded, n, p.q.dtype, reinterpret_cast<uint8_t*>(p.q.at(i, j0)),
                  row.below);
  }
}

template <class Input>
void cast(const RowOps& rows, const CastProblem& p, const Input& input) {
  // 128 rows of 1024 columns stay in L2 between the two passes. A single row stays there anyway.
  const int64_t height = p.scale.block_rows, block = p.scale.block_cols;
  const int64_t width = height == 1 ? p.q.cols : round_up(std::min<int64_t>(1024, p.q.cols), block);
  const int64_t panels = ceil_div(p.q.cols, width);
  // About 64 Ki elements a task: long enough to hide handing it out, short enough to balance.
  const int64_t per_task = std::max<int64_t>((64 << 10) / std::max<int64_t>(width * height, 1), 1);
  const int64_t total = ceil_div(p.q.rows, height) * panels;
  parallel_for(p.threads, ceil_div(total, per_task), [&](int64_t task) {
    for (int64_t t = task * per_task; t < std::min((task + 1) * per_task, total); ++t) {
      const int64_t i0 = t / panels * height, j0 = t % panels * width;
      cast_panel(rows, p, i0, std::min(i0 + height, p.q.rows), j0, std::min(width, p.q.cols - j0), input);
    }
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
