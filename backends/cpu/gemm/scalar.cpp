#include "cpu/simd/scalar.h"

#include "cpu/gemm/stream.h"
#include "cpu/gemm/tile.h"
#include "cpu/rows.h"

namespace moekern::cpu {

constexpr int MR = 4, NV = 1;

extern const GemmIsa k_scalar;
constexpr GemmIsa k_scalar = {&kRowOps, MR, NV * W, pack<NV>, tile<MR, NV>, W, kStreamRows, stream, permute, reduce};

}  // namespace moekern::cpu
