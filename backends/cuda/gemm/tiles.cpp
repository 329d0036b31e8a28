#include "cuda/gemm/tiles.h"

#include <algorithm>

#include "cuda/gemm/operands.h"
#include "moekern/arguments.h"

namespace moekern::cuda {

const char* const kDenseKernels[] = {
#define MOEKERN_TILE(ROWS, COLUMNS) "hopper_gemm_" #ROWS "x" #COLUMNS,
#include "cuda/kernels/gemm_tiles.inc"
};

const char* const kGroupedKernels[] = {
#define MOEKERN_TILE(ROWS, COLUMNS) "hopper_grouped_gemm_" #ROWS "x" #COLUMNS,
#include "cuda/kernels/gemm_tiles.inc"
};

const char* const kDenseStreamKernels[] = {"hopper_gemm_stream_8", "hopper_gemm_stream_16", "hopper_gemm_stream_32",
                                           "hopper_gemm_stream_64"};

const char* const kGroupedStreamKernels[] = {"hopper_grouped_gemm_stream_8", "hopper_grouped_gemm_stream_16",
                                             "hopper_grouped_gemm_stream_32", "hopper_grouped_gemm_stream_64"};

namespace {

struct Size {
  int rows, columns, shared_bytes;
};

constexpr Size kSizes[] = {
#define MOEKERN_TILE(ROWS, COLUMNS) {ROWS, COLUMNS, gemm_shared_bytes(ROWS, COLUMNS)},
#include "cuda/kernels/gemm_tiles.inc"
};

// As many as a device runs at a time, `each` on a multiprocessor, or as there is work for.
unsigned blocks_of(const GemmParameters& p, int64_t units, int each, Stream stream) {
  const int64_t most = std::max(limits(stream.device).processors * each / p.cluster, 1);
  return static_cast<unsigned>(std::min(units, most) * p.cluster);
}

// Of tiles of so many columns, if nothing is to be added.
void map_result(GemmParameters& p, const Stack& out, int columns) {
  p.out.mapped = !p.c.data && !p.bias.data && has_tensor_map(out);
  if (p.out.mapped) p.out_map = tensor_map(result_boxes(out, columns));
}

}  // namespace

void launch_tiles(const char* const* kernels, const TilePlan& plan, GemmParameters& p, const Stack& a, const Stack& b,
                  const Stack& out, int64_t units, Stream stream) {
  const Size* size = std::find_if(std::begin(kSizes), std::end(kSizes),
                                  [&](const Size& s) { return s.rows == plan.rows && s.columns == plan.columns; });
  check(size != std::end(kSizes), "backends/cuda/hopper.py chose tiles of ", plan.rows, " x ", plan.columns,
        ", which no kernel has");
  p.shared = plan.shared;
  p.cluster = plan.shared ? 2 : 1;
  p.band = plan.band;
  if (p.k > 0) {
    p.a_map = tensor_map(operand_boxes(a, plan.shared == 1 ? plan.rows / 2 : plan.rows));
    p.b_map = weight_map(operand_boxes(b, plan.shared == 2 ? plan.columns / 2 : plan.columns));
  }
  map_result(p, out, plan.columns);
  launch({kernels[size - kSizes],
          {blocks_of(p, units, 1, stream), 1, 1},
          kGemmThreads,
          static_cast<unsigned>(p.cluster),
          static_cast<unsigned>(size->shared_bytes),
          &p},
         stream);
}

void launch_stream(const char* const* kernels, const StreamPlan& plan, GemmParameters& p, const Stack& a,
                   const Stack& b, int64_t tiles, Stream stream) {
  static constexpr int kRows[] = {8, 16, 32, 64};
  static constexpr int kBytes[] = {stream_shared_bytes(8), stream_shared_bytes(16), stream_shared_bytes(32),
                                   stream_shared_bytes(64)};
  const auto* rows = std::find(std::begin(kRows), std::end(kRows), plan.tokens);
  check(rows != std::end(kRows), "backends/cuda/hopper.py chose tiles of ", plan.tokens, " rows, which no kernel has");
  p.cluster = plan.splits;
  if (p.k > 0) {
    p.a_map = tensor_map(operand_boxes(a, plan.tokens));
    p.b_map = weight_map(operand_boxes(b, kStreamColumns));
  }
  launch({kernels[rows - kRows],
          {blocks_of(p, tiles, 2, stream), 1, 1},
          kStreamThreads,
          static_cast<unsigned>(p.cluster),
          static_cast<unsigned>(kBytes[rows - kRows]),
          &p},
         stream);
}

void launch_cross(GemmParameters& p, const Stack& a, const Stack& b, const Stack& out, Stream stream) {
  if (p.k > 0) {
    p.a_map = tensor_map(operand_boxes(a, kStep));
    p.b_map = tensor_map(operand_boxes(b, kStep));
  }
  map_result(p, out, kCross);
  const int64_t units = p.groups * blocks(p.rows, kCross) * blocks(p.n, kCross);
  launch({"hopper_k_grouped_gemm",
          {blocks_of(p, units, 1, stream), 1, 1},
          kCrossThreads,
          1,
          static_cast<unsigned>(cross_shared_bytes()),
          &p},
         stream);
}

}  // namespace moekern::cuda
