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

// For many products: those with few rows are streamed, by an ISA that may be null, the others packed.
struct GemmPair {
  const GemmIsa* stream;
  const GemmIsa* packed;
};

inline bool streams(const GemmPair& isa, const GemmProblem& p) { return isa.stream && !stream_refuses(*isa.stream, p); }

void gemm_grouped(const GemmPair& isa, const GroupedGemmProblem& p);
const char* grouped_refuses(const GemmPair& isa, const GroupedGemmProblem& p);

}  // namespace moekern::cpu
