// The two shapes of CPU GEMM, which take any GemmProblem that their `refuses` accepts, and the grouped
// products made of them.
#pragma once
#include "cpu/gemm/ukernel.h"
#include "moekern/kernel.h"

namespace moekern::cpu {

void gemm_packed(const GemmIsa& isa, const GemmProblem& p);
const char* packed_refuses(const GemmIsa& isa, const GemmProblem& p);

void gemm_streamed(const GemmIsa& isa, const GemmProblem& p);
const char* stream_refuses(const GemmIsa& isa, const GemmProblem& p);

// Groups of few rows are streamed, if there is an ISA for that; the others are packed.
void gemm_grouped(const GemmIsa* stream, const GemmIsa& packed, const GroupedGemmProblem& p);
const char* grouped_refuses(const GemmIsa* stream, const GemmIsa& packed, const GroupedGemmProblem& p);

}  // namespace moekern::cpu
