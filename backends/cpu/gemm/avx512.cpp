#include "cpu/simd/avx512.h"

#include "cpu/gemm/stream.h"
#include "cpu/gemm/tile.h"
#include "cpu/rows.h"

namespace moekern::cpu {

constexpr int MR = 12, NV = 2;

extern const GemmIsa k_avx512;
constexpr GemmIsa k_avx512 = {&kRowOps, MR, NV * W, pack<NV>, tile<MR, NV>, W, kStreamRows, stream, permute, reduce};

}  // namespace moekern::cpu
