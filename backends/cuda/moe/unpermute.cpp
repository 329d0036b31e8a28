// Its kernels: kernels/unpermute.cu.
#include <algorithm>

#include "cuda/kernels/permute_parameters.h"
#include "cuda/launch.h"
#include "cuda/moe/permute.h"
#include "cuda/rows.h"
#include "cuda/strided.h"

namespace moekern::cuda {
namespace {

// Whether all rows come in 16 bytes at a time, and go out in as many elements.
bool whole(const UnpermuteProblem& p) {
  const int64_t elements = kPieceBytes / size_of(p.y.dtype);
  return has_rows_at(p.y, kPieceBytes) && p.y.cols % elements == 0 &&
         has_rows_at(p.out, std::min(kPieceBytes, elements * size_of(p.out.dtype)));
}

const char* kernel_of(const UnpermuteProblem& p) {
  if (!whole(p)) return "unpermute_elements";
  return p.y.dtype == Dtype::f32 ? "unpermute_f32" : p.y.dtype == Dtype::f16 ? "unpermute_f16" : "unpermute_bf16";
}

}  // namespace

const char* unpermute_refuses(const UnpermuteProblem& p) {
  if (p.y.rows > INT32_MAX || p.inverse.cols > INT32_MAX) return "takes fewer than 2^31 rows and slots";
  return p.out.rows * ceil_div<int64_t>(p.out.cols, kUnpermuteThreads) > INT32_MAX ? "takes fewer or shorter rows"
                                                                                   : nullptr;
}

void unpermute(const UnpermuteProblem& p) {
  const int64_t pieces = whole(p) ? p.y.cols * size_of(p.y.dtype) / kPieceBytes : p.y.cols;
  const uint32_t row_warps = power_of_two(ceil_div<int64_t>(pieces, 32), kUnpermuteThreads / 32);
  const int64_t column_tiles = ceil_div<int64_t>(pieces, 32 * row_warps);
  const UnpermuteParameters parameters{strided(p.y),
                                       strided(p.inverse),
                                       strided(p.weights),
                                       strided(p.out),
                                       static_cast<uint32_t>(p.out.rows),
                                       static_cast<uint32_t>(p.inverse.cols),
                                       static_cast<uint32_t>(p.y.rows),
                                       static_cast<uint32_t>(p.y.cols),
                                       row_warps,
                                       static_cast<uint32_t>(column_tiles)};
  const int64_t blocks = ceil_div<int64_t>(p.out.rows, kUnpermuteThreads / 32 / row_warps) * column_tiles;
  launch({kernel_of(p), {static_cast<unsigned>(blocks), 1, 1}, kUnpermuteThreads, 1, 0, &parameters}, p.stream);
}

}  // namespace moekern::cuda
