// Rows cast 1 x 128 on their way to where their slots went: a token's row is read and cast once, while permute_sort
// still runs, and its codes and scales are written to all its places.
#include "cuda/kernels/cast_rows.cuh"
#include "cuda/kernels/overlap.cuh"
#include "cuda/kernels/permute_parameters.h"

namespace moekern::cuda {
namespace {

template <class Input>
__device__ void permute_cast(const PermuteCastParameters& p) {
  cast_rows<Input>(p.cast, [&](uint32_t token, const auto& store) {
    wait_for_launch_ahead();
    for (uint32_t slot = 0; slot < p.topk; ++slot) {
      const int32_t row = *reinterpret_cast<const int32_t*>(at(p.inverse, token, slot));
      if (row >= 0 && row < p.rows) store(row);
    }
  });
}

}  // namespace

#define MOEKERN_PERMUTE_CAST(NAME, INPUT)                                                                            \
  extern "C" __global__ void __launch_bounds__(kCastThreads) NAME(const __grid_constant__ PermuteCastParameters p) { \
    permute_cast<INPUT>(p);                                                                                          \
  }

MOEKERN_PERMUTE_CAST(permute_cast_f32, Whole<Dtype::f32>)
MOEKERN_PERMUTE_CAST(permute_cast_f16, Whole<Dtype::f16>)
MOEKERN_PERMUTE_CAST(permute_cast_bf16, Whole<Dtype::bf16>)
MOEKERN_PERMUTE_CAST(permute_cast_elements, Elements)

}  // namespace moekern::cuda
