// Of the casts to FP8.
#pragma once
#include "cuda/kernels/strided.h"

namespace moekern::cuda {

constexpr int kCastThreads = 256;
constexpr int kCastBlock = 128;   // columns, or rows, that share a scale
constexpr int kBlocksATime = 32;  // 1 x 128 blocks that a thread block casts: 16 elements a thread

struct CastParameters {
  Strided x, q, scale;  // all of x's first half where it is gated
  int64_t up_step;      // bytes from a gate to its up
  uint32_t rows, cols;  // rows of x, columns of q
  uint32_t col_blocks;  // 128 columns each
  bool round_scale_up;
};

}  // namespace moekern::cuda
