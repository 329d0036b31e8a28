// The streaming GEMM by blocks of weight rows, for the drivers that hand them out as tasks.
#pragma once
#include "cpu/gemm/operands.h"

namespace moekern::cpu {

// Rows of activations normalised to f32, their scales included, and permuted for the ISA.
struct StreamedActivations {
  float* values;   // [rows][k_padded]
  int* exponents;  // [rows], of the power of two taken out
  int64_t k_padded;
  const int32_t* index;  // which of these rows is row i of a product; null: row i
  int64_t row(int64_t i) const { return index ? index[i] : i; }
};

int64_t streamed_bytes(int64_t rows, int64_t k);
StreamedActivations streamed_activations(int64_t rows, int64_t k, char* memory);

// Fills row `row` of `a` with row i of the product's activations.
void stream_activations(const GemmIsa& isa, const GemmProblem& p, int64_t i, const StreamedActivations& a, int64_t row);

int64_t streamed_task_rows(int64_t n, int threads);  // of all weight rows that a region has

// sums[i * ld + j] = row i of the product, column j0 + j, for j < cols. `next` is where the weights that the
// thread takes next begin.
void streamed_block(const GemmIsa& isa, const GemmProblem& p, const StreamedActivations& a, int64_t j0, int64_t cols,
                    const char* next, float* sums, int64_t ld);

}  // namespace moekern::cpu
