// fused_experts on the CPU.
#pragma once
#include "cpu/gemm/ukernel.h"
#include "moekern/kernel.h"

namespace moekern::cpu {

// `stream` serves experts with few rows, and may be null; `packed` all others.
struct ExpertsIsa {
  const GemmIsa* stream;
  const GemmIsa* packed;
};

void fused_experts(const ExpertsIsa& isa, const ExpertsProblem& p);
const char* experts_refuse(const ExpertsIsa& isa, const ExpertsProblem& p);
int64_t experts_workspace_bytes(const ExpertsProblem& p);

}  // namespace moekern::cpu
