// D[i] = cast(A[i] B[g]^T) for the rows of every group.
#include "cuda/kernels/gemm.cuh"

using namespace moekern::cuda;

#define MOEKERN_TILE(ROWS, COLUMNS)                                                      \
  extern "C" __global__ void __launch_bounds__(kGemmThreads, 1)                          \
      hopper_grouped_gemm_##ROWS##x##COLUMNS(const __grid_constant__ GemmParameters p) { \
    gemm<ROWS, COLUMNS, GroupedTiles<ROWS, COLUMNS>, false>(p);                          \
  }
#include "cuda/kernels/gemm_tiles.inc"
