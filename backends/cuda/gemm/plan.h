// How a product is cut into tiles: what backends/cuda/hopper.py says, asked once for every shape and remembered.
#pragma once
#include <cstdint>

namespace moekern::cuda {

// rows: of the product, or of a group on average; as hopper.Shape.
struct PlanCase {
  int64_t processors, rows, columns, k, groups, out_bytes;
};

// As hopper.Plan.
struct TilePlan {
  int32_t rows, columns, shared, band;
};

// As hopper.StreamPlan.
struct StreamPlan {
  int32_t tokens, splits;
};

TilePlan tile_plan(const PlanCase& of);
StreamPlan stream_plan(const PlanCase& of);

}  // namespace moekern::cuda
