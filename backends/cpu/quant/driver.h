// Casts between f32, f16, bf16 and FP8 with block scales.
#pragma once
#include "cpu/gemm/ukernel.h"
#include "moekern/kernel.h"

namespace moekern::cpu {

void cast_to_fp8(const RowOps& rows, const CastProblem& p);
void silu_mul_cast_to_fp8(const RowOps& rows, const CastProblem& p);
void dequantize(const RowOps& rows, const CastProblem& p);

}  // namespace moekern::cpu
