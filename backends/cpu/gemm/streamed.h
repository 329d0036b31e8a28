// The streaming GEMM by blocks of weight rows, for the drivers that hand them out as tasks.
#pragma once
#include "cpu/gemm/operands.h"

namespace moekern::cpu {

// All rows of a problem's activations, normalised to f32, their scales included, and permuted for the ISA.
struct StreamedActivations {
  float* values;   // [rows][k_padded]
  int* exponents;  // [rows], of the power of two taken out
  int64_t k_padded;
};

StreamedActivations streamed_activations(const GemmIsa& isa, const GemmProblem& p);

// Weight rows to a task: enough that what surrounds a task does not count, few enough that the task that is
// prefetched meanwhile stays in L2.
int64_t streamed_task_rows(const GemmIsa& isa, const GemmProblem& p);

// sums[i * ld + j] = row i of the product, column j0 + j, for j < cols. `call` and `p` name the scaled
// activations that a thread keeps between tasks; `next` is where the weights of its next one begin.
void streamed_block(const GemmIsa& isa, const GemmProblem& p, const StreamedActivations& a, uint64_t call, int64_t j0,
                    int64_t cols, const char* next, float* sums, int64_t ld);

uint64_t new_call();  // a number that no other call has

}  // namespace moekern::cpu
