#include "cpu/gemm/operands.h"

#include <algorithm>
#include <cmath>

#include "cpu/parallel.h"
#include "moekern/float_formats.h"

namespace moekern::cpu {

float element(const Matrix& m, int64_t row, int64_t col) {
  const char* at = m.at(row, col);
  switch (m.dtype) {
    case Dtype::f32: return *reinterpret_cast<const float*>(at);
    case Dtype::f16: return f16_to_f32(*reinterpret_cast<const uint16_t*>(at));
    case Dtype::bf16: return bf16_to_f32(*reinterpret_cast<const uint16_t*>(at));
    case Dtype::ue8m0: return ue8m0_to_f32(static_cast<uint8_t>(*at));
    default: return fp8_to_f32(m.dtype, static_cast<uint8_t>(*at));
  }
}

float scale_of(const ScaleGrid& grid, int64_t row, int64_t col) {
  return grid.values ? element(grid.values, row / grid.block_rows, col / grid.block_cols) : 1.f;
}

int exponent_of(float amax) { return static_cast<int>(float_bits(amax) >> 23 & 255) - 127; }

float power_of_two(int exponent) { return std::ldexp(1.f, exponent); }

int normalised_scales(const ScaleGrid& grid, int64_t row, int64_t k_blocks, float* dst, int64_t stride) {
  const int64_t grid_row = row / grid.block_rows;
  float top = 0.f;
  for (int64_t kb = 0; kb < k_blocks; ++kb) {
    const float scale = grid.values ? element(grid.values, grid_row, kb * kBlock / grid.block_cols) : 1.f;
    dst[kb * stride] = scale;
    top = std::max(top, std::abs(scale));
  }
  const int e = exponent_of(top);
  const float normalise = power_of_two(-e);
  for (int64_t kb = 0; kb < k_blocks; ++kb) dst[kb * stride] *= normalise;
  return e;
}

int normalised_row(const RowOps& rows, const GemmProblem& p, int64_t i, bool scaled, int top, int64_t k_padded,
                   float* dst) {
  const int64_t k = p.k();
  if (p.a.col_stride == 1) {
    rows.load(p.a.dtype, p.a.at(i, 0), k, dst);
  } else {
    for (int64_t j = 0; j < k; ++j) dst[j] = element(p.a, i, j);
  }
  if (scaled && p.sa.values) {
    for (int64_t j = 0; j < k; j += p.sa.block_cols) {
      const int64_t n = k - j < p.sa.block_cols ? k - j : p.sa.block_cols;
      rows.scale(dst + j, scale_of(p.sa, i, j), n, dst + j);
    }
  }
  const int e = exponent_of(rows.amax(dst, k));
  // top - e reaches 247, beyond f32's largest power: two factors.
  const int first = std::min(top - e, 120), second = top - e - first;
  rows.scale(dst, power_of_two(first), k, dst);
  if (second) rows.scale(dst, power_of_two(second), k, dst);
  for (int64_t j = k; j < k_padded; ++j) dst[j] = 0.f;
  return e;
}

int result_exponent_f32(Dtype weights, int row_exponent) {
  return row_exponent - kTopF32 + 127 - layout_of(weights).bias;
}

const char* panel_refuses(Dtype panel, const GemmProblem& p) {
  if (panel != Dtype::bf16) return nullptr;
  if (!is_fp8(p.a.dtype) && p.a.dtype != Dtype::bf16) return "multiplies in bf16, which a does not fit exactly";
  if (p.sa.values && p.sa.block_cols % kBlock != 0 && p.sa.block_cols < p.k())
    return "the scale blocks of a must be a multiple of 128 wide, or as wide as k";
  return nullptr;
}

void scale_by_power(const RowOps& rows, float* x, int64_t n, int exponent) {
  const int last = std::clamp(exponent, -126, 127);  // within f32's powers, and the step that may round
  if (exponent != last) rows.scale(x, power_of_two(exponent - last), n, x);
  rows.scale(x, power_of_two(last), n, x);
}

void store_row(const RowOps& rows, const float* values, int64_t n, const Matrix& m, int64_t row, int64_t col) {
  if (m.col_stride == 1) return rows.store(m.dtype, values, n, m.at(row, col));
  for (int64_t j = 0; j < n; ++j) rows.store(m.dtype, values + j, 1, m.at(row, col + j));
}

void write_row(const RowOps& rows, const GemmProblem& p, int64_t i, int64_t j0, int64_t n, float* sums) {
  const auto add_row = [&](const Matrix& m, int64_t row) {
    if (!m) return;
    float* values = scratch_of<float>(Slot::row, n);
    if (m.col_stride == 1) {
      rows.load(m.dtype, m.at(row, j0), n, values);
    } else {
      for (int64_t j = 0; j < n; ++j) values[j] = element(m, row, j0 + j);
    }
    for (int64_t j = 0; j < n; ++j) sums[j] += values[j];
  };
  add_row(p.bias, 0);
  add_row(p.c, i);
  store_row(rows, sums, n, p.out, i, j0);
}

}  // namespace moekern::cpu
