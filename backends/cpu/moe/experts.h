// fused_experts on the CPU.
#pragma once
#include "cpu/gemm/driver.h"

namespace moekern::cpu {

void fused_experts(const GemmPair& isa, const ExpertsProblem& p);
const char* experts_refuse(const GemmPair& isa, const ExpertsProblem& p);
int64_t experts_workspace_bytes(const ExpertsProblem& p);

}  // namespace moekern::cpu
