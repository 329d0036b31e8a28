// fused_experts: what an ISA's row in registry.cpp calls.
#pragma once
#include "cpu/gemm/ukernel.h"
#include "moekern/kernel.h"

namespace moekern::cpu {

void fused_experts(const GemmIsa& isa, const ExpertsProblem& p);
const char* experts_refuse(const GemmIsa& isa, const ExpertsProblem& p);
int64_t experts_workspace_bytes(const ExpertsProblem& p);

}  // namespace moekern::cpu
