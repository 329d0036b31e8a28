// Their kernels: kernels/cast.cu and kernels/silu_mul_cast.cu.
#include "cuda/quant/cast.h"

#include "cuda/launch.h"
#include "cuda/rows.h"
#include "cuda/strided.h"

namespace moekern::cuda {
namespace {

constexpr CastKernels k1x128 = {"cast_1x128_f32", "cast_1x128_f16", "cast_1x128_bf16", "cast_1x128_elements"};
constexpr CastKernels k128x128 = {"cast_128x128_f32", "cast_128x128_f16", "cast_128x128_bf16", "cast_128x128_elements"};
constexpr CastKernels k128x1 = {"cast_128x1_f32", "cast_128x1_f16", "cast_128x1_bf16", "cast_128x1_elements"};
constexpr CastKernels kSiluMul = {"silu_mul_cast_f32", "silu_mul_cast_f16", "silu_mul_cast_bf16",
                                  "silu_mul_cast_elements"};

// Whether all of x comes in 16 bytes at a time, and as many codes leave together.
bool whole(const CastProblem& p) {
  const int64_t elements = kPieceBytes / size_of(p.x.dtype);
  return has_rows_at(p.x, kPieceBytes) && has_rows_at(p.q, elements) && p.q.cols % elements == 0;
}

int64_t col_blocks(const CastProblem& p) { return ceil_div<int64_t>(p.q.cols, kCastBlock); }

void run(const CastProblem& p, const CastKernels& kernels) {
  const CastParameters parameters = parameters_of(p);
  const auto tiles = static_cast<unsigned>(ceil_div<int64_t>(p.x.rows, kCastBlock) * col_blocks(p));
  launch({kernel_for(p, kernels),
          {p.scale.block_rows == 1 ? row_blocks(p) : tiles, 1, 1},
          kCastThreads,
          1,
          0,
          &parameters},
         p.stream);
}

}  // namespace

const char* kernel_for(const CastProblem& p, const CastKernels& kernels) {
  return kernels[!whole(p) ? 3 : p.x.dtype == Dtype::f32 ? 0 : p.x.dtype == Dtype::f16 ? 1 : 2];
}

CastParameters parameters_of(const CastProblem& p) {
  return {strided(p.x),
          strided(p.q),
          strided(p.scale.values),
          p.q.cols * p.x.col_stride * size_of(p.x.dtype),
          static_cast<uint32_t>(p.x.rows),
          static_cast<uint32_t>(p.q.cols),
          static_cast<uint32_t>(col_blocks(p)),
          p.round_scale_up};
}

unsigned row_blocks(const CastProblem& p) {
  return static_cast<unsigned>(ceil_div<int64_t>(p.x.rows * col_blocks(p), kBlocksATime));
}

const char* cast_refuses(const CastProblem& p) {
  if (p.x.rows > INT32_MAX || p.q.cols > INT32_MAX || p.x.rows * col_blocks(p) > INT32_MAX)
    return "takes fewer than 2^31 blocks";
  return nullptr;
}

void cast_to_fp8(const CastProblem& p) {
  run(p, p.scale.block_rows == 1 ? k1x128 : p.scale.block_cols == 1 ? k128x1 : k128x128);
}

void silu_mul_cast_to_fp8(const CastProblem& p) { run(p, kSiluMul); }

}  // namespace moekern::cuda
