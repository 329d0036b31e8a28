// D = cast(C + bias + A B^T): dense products.
#include "cuda/kernels/gemm.cuh"

using namespace moekern::cuda;

#define MOEKERN_TILE(ROWS, COLUMNS)                                              \
  extern "C" __global__ void __launch_bounds__(kGemmThreads, 1)                  \
      hopper_gemm_##ROWS##x##COLUMNS(const __grid_constant__ GemmParameters p) { \
    gemm<ROWS, COLUMNS, DenseTiles<ROWS, COLUMNS>, true>(p);                     \
  }
#include "cuda/kernels/gemm_tiles.inc"
