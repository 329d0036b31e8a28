// The experts of every token.
#pragma once
#include "moekern/kernel.h"

namespace moekern::cuda {

const char* gate_refuses(const GateProblem& p);
void gate(const GateProblem& p);

}  // namespace moekern::cuda
