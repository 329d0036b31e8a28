// silu(gate) * up, cast 1 x 128: the product exists in registers only.
#include "cuda/kernels/cast_rows.cuh"
#include "cuda/kernels/exponential.cuh"

namespace moekern::cuda {
namespace {

// exp within 3 ulp, the sum, the reciprocal within 1, the product: 4 ulp at most where e^-g is no larger than 1, whose
// error then counts half, and 4.5 elsewhere at worst.
__device__ inline float silu(float g) {
  float sigmoid;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(sigmoid) : "f"(__fadd_rn(1.f, exponential(-g))));
  return __fmul_rn(g, sigmoid);
}

template <class Half>
struct Gated : Floats<Half::V> {
  static constexpr bool kWholePieces = Half::kWholePieces;
  using Held = typename Floats<Half::V>::Held;
  struct Loaded {
    typename Half::Loaded gate, up;
  };
  __device__ static Loaded load(const CastParameters& p, uint32_t row, uint32_t col) {
    return {Half::load(p, row, col), Half::load(p, row, col, p.up_step)};
  }
  __device__ static Held hold(const Loaded& x) {
    const typename Half::Held gate = Half::hold(x.gate), up = Half::hold(x.up);
    Held y;
#pragma unroll
    for (int i = 0; i < Half::V; ++i) y.values[i] = __fmul_rn(silu(Half::value(gate, i)), Half::value(up, i));
    return y;
  }
};

}  // namespace

#define MOEKERN_SILU_MUL_CAST(NAME, HALF)                                                                     \
  extern "C" __global__ void __launch_bounds__(kCastThreads) NAME(const __grid_constant__ CastParameters p) { \
    cast_rows<Gated<HALF>>(p);                                                                                \
  }

MOEKERN_SILU_MUL_CAST(silu_mul_cast_f32, Whole<Dtype::f32>)
MOEKERN_SILU_MUL_CAST(silu_mul_cast_f16, Whole<Dtype::f16>)
MOEKERN_SILU_MUL_CAST(silu_mul_cast_bf16, Whole<Dtype::bf16>)
MOEKERN_SILU_MUL_CAST(silu_mul_cast_elements, Elements)

}  // namespace moekern::cuda
