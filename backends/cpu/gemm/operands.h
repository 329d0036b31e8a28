// What both GEMM drivers need of their operands: activations as normalised f32 rows, scales, and
// the epilogue.
#pragma once
#include <cstdint>

#include "cpu/gemm/ukernel.h"
#include "moekern/kernel.h"

namespace moekern::cpu {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

float element(const Matrix& m, int64_t row, int64_t col);         // any dtype, as f32
float scale_of(const ScaleGrid& grid, int64_t row, int64_t col);  // of the element's block; 1 without a grid

// The exponent of the largest magnitude, floor(log2 |x|), within [-127, 128].
int exponent_of(float amax);
float power_of_two(int exponent);

// The scales along `row`, one per 128 of k and `stride` apart, over the power of two of the largest, whose
// exponent is returned: a scale of 1e30 times another operand's 1e30 is no infinity before the sum is complete.
int normalised_scales(const ScaleGrid& grid, int64_t row, int64_t k_blocks, float* dst, int64_t stride);

// dst[0 .. k) = row i of a, its scales included on demand, times 2^(top - e) where e, returned, is the
// exponent of its largest magnitude. A power of two loses nothing, and activations of any size come
// to the same place in f32's range. The pad up to k_padded is zero.
int normalised_row(const RowOps& rows, const GemmProblem& p, int64_t i, bool scaled, int top, int64_t k_padded,
                   float* dst);

// Where an f32 panel's weights are value * 2^-120 or so (gemm/decode.h), activations of 2^120 bring the
// products to the middle of f32's range.
constexpr int kTopF32 = 120;

// The exponent that undoes such activations and weights.
int result_exponent_f32(Dtype weights, int row_exponent);

// Why activations do not fit a panel of that type exactly, or null.
const char* panel_refuses(Dtype panel, const GemmProblem& p);

// x *= 2^exponent, which may be beyond f32's powers.
void scale_by_power(const RowOps& rows, float* x, int64_t n, int exponent);

// out[i, j0 .. j0 + n) = cast(c + bias + sums), sums overwritten.
void write_row(const RowOps& rows, const GemmProblem& p, int64_t i, int64_t j0, int64_t n, float* sums);

// Stores n values to row `row` of m from column `col` on.
void store_row(const RowOps& rows, const float* values, int64_t n, const Matrix& m, int64_t row, int64_t col);

}  // namespace moekern::cpu
