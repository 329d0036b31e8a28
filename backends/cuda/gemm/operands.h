// Operands as the GEMM kernels are given them.
#pragma once
#include "cuda/kernels/gemm_parameters.h"
#include "cuda/launch.h"

namespace moekern::cuda {

// Why these kernels cannot take an operand or its scales, or null. k: columns that share the scales' blocks.
const char* operand_refused(const Stack& x);
const char* scales_refused(const ScaleGrid& s, int64_t k);
const char* weight_scales_refused(const ScaleGrid& s, int64_t n, int64_t k);

Rows rows_of(const Stack& x);
Scales scales_of(const ScaleGrid& s, int64_t group_stride);
Addend addend_of(const Stack& x);
Result result_of(const Stack& x);

// Of e4m3 rows: boxes of so many of them, and of 128 columns.
Boxed operand_boxes(const Stack& x, int rows);

// Of a warp's results in tiles of so many columns.
Boxed result_boxes(const Stack& out, int columns);

}  // namespace moekern::cuda
