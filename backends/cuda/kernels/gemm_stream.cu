// D = cast(C + bias + A B^T) of few rows: dense products, and those of groups that have few each.
#include "cuda/kernels/gemm_stream.cuh"

using namespace moekern::cuda;

#define MOEKERN_STREAM(ROWS)                                                        \
  extern "C" __global__ void __launch_bounds__(kStreamThreads, 2)                   \
      hopper_gemm_stream_##ROWS(const __grid_constant__ GemmParameters p) {         \
    gemm_stream<ROWS, DenseTiles<ROWS, kStreamColumns>>(p);                         \
  }                                                                                 \
  extern "C" __global__ void __launch_bounds__(kStreamThreads, 2)                   \
      hopper_grouped_gemm_stream_##ROWS(const __grid_constant__ GemmParameters p) { \
    gemm_stream<ROWS, GroupedTiles<ROWS, kStreamColumns>>(p);                       \
  }

MOEKERN_STREAM(8)
MOEKERN_STREAM(16)
MOEKERN_STREAM(32)
MOEKERN_STREAM(64)
