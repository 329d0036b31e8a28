// Floats to FP8 with scales.
#pragma once
#include "cuda/kernels/cast_parameters.h"
#include "moekern/kernel.h"

namespace moekern::cuda {

// By the input: f32, f16, bf16, and of any strides or dtype.
using CastKernels = const char* [4];
const char* kernel_for(const CastProblem& p, const CastKernels& kernels);
CastParameters parameters_of(const CastProblem& p);
unsigned row_blocks(const CastProblem& p);  // thread blocks of a 1 x 128 cast

const char* cast_refuses(const CastProblem& p);
void cast_to_fp8(const CastProblem& p);
void silu_mul_cast_to_fp8(const CastProblem& p);

}  // namespace moekern::cuda
