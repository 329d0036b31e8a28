// The two shapes of CPU GEMM. Both take any GemmProblem that their `refuses` accepts.
#pragma once
#include "cpu/gemm/ukernel.h"
#include "moekern/kernel.h"

namespace moekern::cpu {

void gemm_packed(const GemmIsa& isa, const GemmProblem& p);
const char* packed_refuses(const GemmIsa& isa, const GemmProblem& p);

void gemm_streamed(const GemmIsa& isa, const GemmProblem& p);
const char* stream_refuses(const GemmIsa& isa, const GemmProblem& p);

}  // namespace moekern::cpu
