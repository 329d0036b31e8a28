// FP8 with scales to floats.
#pragma once
#include "moekern/kernel.h"

namespace moekern::cuda {

const char* dequantize_refuses(const CastProblem& p);
void dequantize(const CastProblem& p);

}  // namespace moekern::cuda
