// Their kernels: kernels/cast.cu and kernels/silu_mul_cast.cu.
#include "cuda/quant/cast.h"

#include "cuda/kernels/cast_parameters.h"
#include "cuda/launch.h"
#include "cuda/rows.h"
#include "cuda/strided.h"

namespace moekern::cuda {
namespace {

// By the input: f32, f16, bf16, and of any strides or dtype.
using Kernels = const char* [4];
constexpr Kernels k1x128 = {"cast_1x128_f32", "cast_1x128_f16", "cast_1x128_bf16", "cast_1x128_elements"};
constexpr Kernels k128x128 = {"cast_128x128_f32", "cast_128x128_f16", "cast_128x128_bf16", "cast_128x128_elements"};
constexpr Kernels k128x1 = {"cast_128x1_f32", "cast_128x1_f16", "cast_128x1_bf16", "cast_128x1_elements"};
constexpr Kernels kSiluMul = {"silu_mul_cast_f32", "silu_mul_cast_f16", "silu_mul_cast_bf16", "silu_mul_cast_elements"};

// Whether all of x comes in 16 bytes at a time, and as many codes leave together.
bool whole(const CastProblem& p) {
  const int64_t elements = kPieceBytes / size_of(p.x.dtype);
  return has_rows_at(p.x, kPieceBytes) && has_rows_at(p.q, elements) && p.q.cols % elements == 0;
}

int64_t col_blocks(const CastProblem& p) { return ceil_div<int64_t>(p.q.cols, kCastBlock); }

void run(const CastProblem& p, const Kernels& kernels) {
  const CastParameters parameters{strided(p.x),
                                  strided(p.q),
                                  strided(p.scale.values),
                                  p.q.cols * p.x.col_stride * size_of(p.x.dtype),
                                  static_cast<uint32_t>(p.q.rows),
                                  static_cast<uint32_t>(p.q.cols),
                                  static_cast<uint32_t>(col_blocks(p)),
                                  p.round_scale_up};
  const int input = !whole(p) ? 3 : p.x.dtype == Dtype::f32 ? 0 : p.x.dtype == Dtype::f16 ? 1 : 2;
  const int64_t blocks = p.scale.block_rows == 1 ? ceil_div<int64_t>(p.q.rows * col_blocks(p), kBlocksATime)
                                                 : ceil_div<int64_t>(p.q.rows, kCastBlock) * col_blocks(p);
  launch({kernels[input], {static_cast<unsigned>(blocks), 1, 1}, kCastThreads, 1, 0, &parameters}, p.stream);
}

}  // namespace

const char* cast_refuses(const CastProblem& p) {
  if (p.q.rows > INT32_MAX || p.q.cols > INT32_MAX || p.q.rows * col_blocks(p) > INT32_MAX)
    return "takes fewer than 2^31 blocks";
  return nullptr;
}

void cast_to_fp8(const CastProblem& p) {
  run(p, p.scale.block_rows == 1 ? k1x128 : p.scale.block_cols == 1 ? k128x1 : k128x128);
}

void silu_mul_cast_to_fp8(const CastProblem& p) { run(p, kSiluMul); }

}  // namespace moekern::cuda
