// Its kernels: kernels/dequantize.cu.
#include "cuda/quant/dequantize.h"

#include <algorithm>

#include "cuda/kernels/dequantize_parameters.h"
#include "cuda/launch.h"
#include "cuda/rows.h"
#include "cuda/strided.h"

namespace moekern::cuda {
namespace {

// Whether all of out is stored 16 bytes at a time, and the codes of so much are loaded together.
bool whole(const CastProblem& p) {
  return has_rows_at(p.x, kPieceBytes) && has_rows_at(p.q, kPieceBytes / size_of(p.x.dtype));
}

int64_t row_pieces(const CastProblem& p) {
  return whole(p) ? ceil_div<int64_t>(p.q.cols, kPieceBytes / size_of(p.x.dtype)) : p.q.cols;
}

int64_t blocks(const CastProblem& p) {
  return ceil_div<int64_t>(p.q.rows * row_pieces(p), kDequantizeThreads * kDequantizePieces);
}

}  // namespace

const char* dequantize_refuses(const CastProblem& p) {
  if (p.q.rows > INT32_MAX || p.q.cols > INT32_MAX || blocks(p) > INT32_MAX) return "takes fewer elements";
  return nullptr;
}

void dequantize(const CastProblem& p) {
  // What the kernel divides by has 32 bits. Blocks larger than the operand are one, and a multiple of 8 columns stays
  // one.
  const auto block = [](int64_t extent) { return static_cast<uint32_t>(std::min<int64_t>(extent, 1u << 31)); };
  const int64_t pieces = row_pieces(p);
  const DequantizeParameters parameters{strided(p.q),
                                        strided(p.scale.values),
                                        strided(p.x),
                                        static_cast<uint32_t>(p.q.rows),
                                        static_cast<uint32_t>(p.q.cols),
                                        static_cast<uint32_t>(pieces),
                                        static_cast<uint32_t>(kDequantizeThreads / pieces),
                                        static_cast<uint32_t>(kDequantizeThreads % pieces),
                                        block(p.scale.block_rows),
                                        block(p.scale.block_cols)};
  const char* kernel = !whole(p)                 ? "dequantize_elements"
                       : p.x.dtype == Dtype::f32 ? "dequantize_f32"
                       : p.x.dtype == Dtype::f16 ? "dequantize_f16"
                                                 : "dequantize_bf16";
  launch({kernel, {static_cast<unsigned>(blocks(p)), 1, 1}, kDequantizeThreads, 1, 0, &parameters}, p.stream);
}

}  // namespace moekern::cuda
