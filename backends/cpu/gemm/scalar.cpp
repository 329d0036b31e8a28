#include "cpu/simd/scalar.h"

#include "cpu/gemm/tile.h"
#include "cpu/rows.h"

namespace moekern::cpu {

// No streaming kernel: one float wide, a dot product would be a single chain of k additions.
constexpr int MR = 4, NV = 1;

extern const GemmIsa k_scalar;
constexpr GemmIsa k_scalar = {&kRowOps, Dtype::f32, W, MR, NV * W, 1, pack<NV>, tile<MR, NV>, nullptr};

}  // namespace moekern::cpu
