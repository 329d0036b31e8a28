// Floats to FP8 with scales.
#pragma once
#include "moekern/kernel.h"

namespace moekern::cuda {

const char* cast_refuses(const CastProblem& p);
void cast_to_fp8(const CastProblem& p);
void silu_mul_cast_to_fp8(const CastProblem& p);

}  // namespace moekern::cuda
