// Its kernels: kernels/dequantize.cu.
#include "cuda/quant/dequantize.h"

#include <algorithm>

#include "cuda/kernels/dequantize_parameters.h"
#include "cuda/launch.h"
#include "cuda/rows.h"
#include "cuda/strided.h"

namespace moekern::cuda {
namespace {

int64_t piece_elements(const CastProblem& p) { return kDequantizePieceBytes / size_of(p.x.dtype); }

int64_t row_pieces(const CastProblem& p) { return ceil_div(p.q.cols, piece_elements(p)); }

int64_t blocks(const CastProblem& p) {
  return ceil_div<int64_t>(p.q.rows * row_pieces(p), kDequantizeThreads * kDequantizePieces);
}

}  // namespace

const char* dequantize_refuses(const CastProblem& p) {
  if (!has_contiguous_rows(p.q)) return "takes data that is contiguous along its rows";
  if (!has_rows_at(p.x, kDequantizePieceBytes)) return "takes an out whose rows begin at multiples of 16 bytes";
  if (!has_rows_at(p.q, piece_elements(p))) return "takes data whose rows begin at multiples of 8 bytes (4 for f32)";
  if (p.q.rows > INT32_MAX || p.q.cols > INT32_MAX || blocks(p) > INT32_MAX) return "takes fewer elements";
  return nullptr;
}

void dequantize(const CastProblem& p) {
  // Those of a power of two of columns stay one, which the kernel asks for.
  const auto block = [](int64_t extent) { return static_cast<uint32_t>(std::min<int64_t>(extent, 1 << 30)); };
  const DequantizeParameters parameters{strided(p.q),
                                        strided(p.scale.values),
                                        strided(p.x),
                                        static_cast<uint32_t>(p.q.rows),
                                        static_cast<uint32_t>(p.q.cols),
                                        static_cast<uint32_t>(row_pieces(p)),
                                        block(p.scale.block_rows),
                                        block(p.scale.block_cols)};
  const char* kernel = p.x.dtype == Dtype::f32   ? "dequantize_f32"
                       : p.x.dtype == Dtype::f16 ? "dequantize_f16"
                                                 : "dequantize_bf16";
  launch({kernel, {static_cast<unsigned>(blocks(p)), 1, 1}, kDequantizeThreads, 1, 0, &parameters}, p.stream);
}

}  // namespace moekern::cuda
