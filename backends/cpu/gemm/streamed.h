// The streaming GEMM by blocks of weight rows, for the drivers that hand them out as tasks.
#pragma once
#include "cpu/gemm/operands.h"

namespace moekern::cpu {

// Rows of activations normalised and permuted for the ISA, in the type that its stream takes.
struct StreamedActivations {
  char* values;       // [rows][k_padded]; f32 with their scales included
  float* row_scales;  // [rows][k_padded / 128] for bf16: a's scales, normalised likewise; null otherwise
  int* exponents;     // [rows], of the powers of two taken out
  int64_t k_padded;
  const int32_t* index;  // which of these rows is row i of a product; null: row i
  int64_t row(int64_t i) const { return index ? index[i] : i; }
};

int64_t streamed_bytes(const GemmIsa& isa, int64_t rows, int64_t k);
StreamedActivations streamed_activations(const GemmIsa& isa, int64_t rows, int64_t k,
                                         char* memory);  // 64-byte aligned

// Fills row `row` of `a` with row i of the product's activations.
void stream_activations(const GemmIsa& isa, const GemmProblem& p, int64_t i, const StreamedActivations& a, int64_t row);

int64_t streamed_task_rows(int64_t n, int threads);  // of all weight rows that a region has

// sums[i * ld + j] = row i of the product, column j0 + j, for j < cols. `next` is where the weights that the
// thread takes next begin.
void streamed_block(const GemmIsa& isa, const GemmProblem& p, const StreamedActivations& a, int64_t j0, int64_t cols,
                    const char* next, float* sums, int64_t ld);

}  // namespace moekern::cpu
