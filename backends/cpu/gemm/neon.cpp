#include "cpu/simd/neon.h"

#include "cpu/gemm/stream.h"
#include "cpu/gemm/tile.h"
#include "cpu/rows.h"

namespace moekern::cpu {

constexpr int MR = 6, NV = 4;  // 24 accumulators + 4 b + 1 a of 32 registers; 10 loads for 24 FMAs
constexpr Stream kStream = stream_up_to(4);

extern const GemmIsa k_neon;
constexpr GemmIsa k_neon = {&kRowOps, Dtype::f32, W, MR, NV * W, 1, pack<NV>, tile<MR, NV>, &kStream};

}  // namespace moekern::cpu
