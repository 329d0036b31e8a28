#include "cpu/quant/driver.h"

#include <algorithm>
#include <cmath>

#include "cpu/gemm/operands.h"
#include "moekern/float_formats.h"
#include "cpu/parallel.h"

namespace moekern::cpu {
namespace {

// s = max(amax, 1e-4) / max_of(format), rounded up to a power of two on demand.
float scale_for(float amax, Dtype format, bool round_up) {
  const float s = (amax < 1e-4f ? 1e-4f : amax) / max_of(format);
  if (!round_up || !(s - s == 0.f)) return s;
  int exponent;
  const float fraction = std::frexp(s, &exponent);  // s = fraction * 2^exponent, fraction in [1/2, 1)
  return std::ldexp(1.f, fraction == 0.5f ? exponent - 1 : exponent);
}

void load_row(const RowOps& rows, const Matrix& x, int64_t i, int64_t j, int64_t n, float* dst) {
  if (x.col_stride == 1) return rows.load(x.dtype, x.at(i, j), n, dst);
  for (int64_t q = 0; q < n; ++q) dst[q] = element(x, i, j + q);
}

// One block of at most block_rows x block_cols: `load(i, j, n, dst)` yields f32, twice (the second
// pass finds it in L1 or L2).
template <class Load>
void cast_block(const RowOps& rows, const CastProblem& p, int64_t i0, int64_t j0, const Load& load) {
  const int64_t i1 = std::min(i0 + p.scale.block_rows, p.q.rows), j1 = std::min(j0 + p.scale.block_cols, p.q.cols);
  float* values = scratch_of<float>(Slot::row, j1 - j0);
  float amax = 0.f;
  for (int64_t i = i0; i < i1; ++i) {
    load(i, j0, j1 - j0, values);
    const float row = rows.amax(values, j1 - j0);
    amax = row > amax || row != row ? row : amax;
    if (amax != amax) break;
  }
  const float s = scale_for(amax, p.q.dtype, p.round_scale_up), inverse = 1.f / s;
  *reinterpret_cast<float*>(p.scale.values.at(i0 / p.scale.block_rows, j0 / p.scale.block_cols)) = s;
  for (int64_t i = i0; i < i1; ++i) {
    if (i1 - i0 > 1) load(i, j0, j1 - j0, values);
    rows.quantize(p.q.dtype, values, inverse, j1 - j0, reinterpret_cast<uint8_t*>(p.q.at(i, j0)));
  }
}

template <class Load>
void cast_blocks(const RowOps& rows, const CastProblem& p, const Load& load) {
  const int64_t block_rows = ceil_div(p.q.rows, p.scale.block_rows);
  // About 64 Ki elements a task: long enough to hide handing it out, short enough to balance.
  const int64_t per_task = std::max<int64_t>((64 << 10) / std::max<int64_t>(p.q.cols * p.scale.block_rows, 1), 1);
  parallel_for(p.threads, ceil_div(block_rows, per_task), [&](int64_t task) {
    for (int64_t b = task * per_task; b < std::min((task + 1) * per_task, block_rows); ++b)
      for (int64_t j = 0; j < p.q.cols; j += p.scale.block_cols) cast_block(rows, p, b * p.scale.block_rows, j, load);
  });
}

}  // namespace

void cast_to_fp8(const RowOps& rows, const CastProblem& p) {
  cast_blocks(rows, p, [&](int64_t i, int64_t j, int64_t n, float* dst) { load_row(rows, p.x, i, j, n, dst); });
}

void silu_mul_cast_to_fp8(const RowOps& rows, const CastProblem& p) {
  cast_blocks(rows, p, [&](int64_t i, int64_t j, int64_t n, float* dst) {
    float* up = scratch_of<float>(Slot::own_a, n);
    load_row(rows, p.x, i, j, n, dst);
    load_row(rows, p.x, i, p.q.cols + j, n, up);
    rows.silu_mul(dst, up, n, dst);
  });
}

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
