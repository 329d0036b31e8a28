// Launches of the kernels.
#pragma once
#include "cuda/gemm/plan.h"
#include "cuda/kernels/gemm_parameters.h"
#include "cuda/launch.h"

namespace moekern::cuda {

// a, b, out: what the parameters' tensor maps are made of. `out` is mapped if nothing is added to it, and it can be.
// units: of tiles or pairs of them, at most.
void launch_tiles(const char* const* kernels, const TilePlan& plan, GemmParameters& p, const Stack& a, const Stack& b,
                  const Stack& out, int64_t units, Stream stream);

// The same for few rows. tiles: at most.
void launch_stream(const char* const* kernels, const StreamPlan& plan, GemmParameters& p, const Stack& a,
                   const Stack& b, int64_t tiles, Stream stream);

// The same for operands that lie across k.
void launch_cross(GemmParameters& p, const Stack& a, const Stack& b, const Stack& out, Stream stream);

constexpr int kMostStreamRows = 64;

// The names of kernels, for 8, 16, 32 and 64 rows.
extern const char* const kDenseStreamKernels[];
extern const char* const kGroupedStreamKernels[];

// The names of kernels, in the order of kernels/gemm_tiles.inc.
extern const char* const kDenseKernels[];
extern const char* const kGroupedKernels[];

// Tiles or pairs in which so many rows and columns are computed.
inline int64_t units_of(const TilePlan& plan, int64_t rows, int64_t columns) {
  const int64_t high = plan.rows * (plan.shared == 2 ? 2 : 1), wide = plan.columns * (plan.shared == 1 ? 2 : 1);
  return (rows + high - 1) / high * ((columns + wide - 1) / wide);
}

}  // namespace moekern::cuda
