#include "cpu/simd/avx512.h"

#include "cpu/gemm/stream.h"
#include "cpu/gemm/tile.h"
#include "cpu/rows.h"

namespace moekern::cpu {

constexpr int MR = 12, NV = 2;
constexpr Stream kStream = stream_up_to(24);

extern const GemmIsa k_avx512;
constexpr GemmIsa k_avx512 = {&kRowOps, Dtype::f32, W, MR, NV * W, 1, pack<NV>, tile<MR, NV>, &kStream};

}  // namespace moekern::cpu
