// Casts between f32, f16, bf16 and FP8 with block scales.
#pragma once
#include "cpu/gemm/ukernel.h"
#include "moekern/kernel.h"

namespace moekern::cpu {

void cast_to_fp8(const RowOps& rows, const CastProblem& p);
// One row of x, in 1 x 128 blocks, to codes and scales that stay in the caches. Uses the scratch memory Slot::own_b.
void cast_row(const RowOps& rows, const Matrix& x, int64_t i, bool round_scale_up, Dtype format, uint8_t* q,
              float* scale);
void silu_mul_cast_to_fp8(const RowOps& rows, const CastProblem& p);
void dequantize(const RowOps& rows, const CastProblem& p);

}  // namespace moekern::cpu
