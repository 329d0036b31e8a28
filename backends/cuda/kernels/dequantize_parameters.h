// Of dequantize: FP8 with a grid of scales to floats.
#pragma once
#include "cuda/kernels/strided.h"

namespace moekern::cuda {

constexpr int kDequantizeThreads = 256;
constexpr int kDequantizePieces = 4;  // of 16 bytes of the result, or elements, that a thread loads before it stores

struct DequantizeParameters {
  Strided q, scale, out;
  uint32_t rows, cols;
  uint32_t row_pieces;              // pieces of a row
  uint32_t step_rows, step_pieces;  // as many pieces as a thread block has threads, in whole rows and the rest
  uint32_t block_rows, block_cols;  // that share a scale
};

}  // namespace moekern::cuda
