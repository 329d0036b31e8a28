// What the GEMM kernels of sm_90a are given, and the constants that they share with the host code that launches them.
#pragma once
#include <cstdint>

#include "cuda/kernels/tensor_map.h"
#include "moekern/dtype.h"

namespace moekern::cuda {

constexpr int kStep =
    128;  // columns of k between promotions: those of one scale, and a row of a swizzled tile in bytes

// Rows of e4m3, k columns each, at any strides. Only sums that overflow float32 are read from here, the rest through
// tensor maps.
struct Rows {
  const uint8_t* data = nullptr;
  int64_t row_stride = 0, column_stride = 1, group_stride = 0;
};

// The scale of row i in step s is values[i / block_rows * row_stride + s / steps * step_stride].
struct Scales {
  const void* values = nullptr;
  int64_t row_stride = 0, step_stride = 0, group_stride = 0;
  int32_t block_rows = 1, steps = 1;
  bool ue8m0 = false;
};

struct Addend {
  const void* data = nullptr;  // null: none
  int64_t row_stride = 0, column_stride = 0, group_stride = 0;
  Dtype dtype = Dtype::f32;
};

struct Result {
  void* data = nullptr;
  int64_t row_stride = 0, column_stride = 0, group_stride = 0;
  Dtype dtype = Dtype::bf16;
  bool mapped = false;  // there is a tensor map of it, and nothing to add: it is stored by the TMA unit
};

// out = cast(c + bias + (a . sa) (b . sb)^T), of one product or of the rows of many groups.
struct GemmParameters {
  TensorMap a_map, b_map, out_map;  // of three dimensions: columns, rows, groups
  Rows a, b;
  Scales sa, sb;
  Addend c, bias;
  Result out;

  // Rows of group g (columns of k, if it is k that is grouped): counts[g] from starts[g] on, of `rows` in all; or if
  // `masked`, the first counts[g] of `rows` in matrix g. Null where there is but one product.
  const int64_t *starts = nullptr, *counts = nullptr;
  int32_t groups = 1, rows = 0, n = 0, k = 0;
  bool masked = false;

  int32_t band = 8;     // rows of tiles that blocks go through together
  int32_t cluster = 1;  // blocks of one
  int32_t shared = 0;   // of a cluster of two blocks: 1, a is the same and each loads half of it for both; 2, b is
};

// ---- the large tiles: two warp groups multiply, a third loads

constexpr int kSharedBytes = 227 * 1024;  // that a block may have
constexpr int kMathWarps = 8;
constexpr int kGemmThreads = 32 * (kMathWarps + 4);
constexpr int kMostStages = 8;

constexpr int greatest_common_divisor(int x, int y) { return y ? greatest_common_divisor(y, x % y) : x; }

// Columns of a tile that have a scale in common whatever tile it is: blocks of b begin at multiples of it.
constexpr int granule(int columns) { return greatest_common_divisor(columns, 128); }

// Scales lie behind one another: of every row, and of every granule of columns.
constexpr int scale_bytes(int rows, int columns) { return (rows + (columns / granule(columns) + 3) / 4 * 4) * 4; }
constexpr int stage_bytes(int rows, int columns) { return (rows + columns) * kStep + scale_bytes(rows, columns); }

// Of every warp 16 rows of 16-bit results, or half of their columns in 32 bits.
constexpr int staging_bytes(int columns) { return kMathWarps * 16 * columns * 2; }

constexpr int stages_of(int rows, int columns) {
  const int fit = (kSharedBytes - staging_bytes(columns)) / (stage_bytes(rows, columns) + 16);  // and two barriers
  return fit < kMostStages ? fit : kMostStages;
}

constexpr int gemm_shared_bytes(int rows, int columns) {
  return staging_bytes(columns) + stages_of(rows, columns) * (stage_bytes(rows, columns) + 16);
}

// ---- few rows: tiles of 64 columns of the result, whose k the blocks of a cluster divide

constexpr int kStreamColumns = 64;
constexpr int kStreamThreads = 32 * (4 + 2);
constexpr int kStreamBytes = 113 * 1024;  // so that a multiprocessor has two blocks
constexpr int kMostStreamStages = 10;
constexpr int kStreamPitch = kStreamColumns + 4;  // floats from one row of sums to the next: no two lanes share a bank

constexpr int stream_sums_bytes(int rows) { return rows * kStreamPitch * 4; }

constexpr int stream_stages(int rows) {
  const int fit = (kStreamBytes - stream_sums_bytes(rows) - 16) / (stage_bytes(rows, kStreamColumns) + 16);
  return fit < kMostStreamStages ? fit : kMostStreamStages;
}

constexpr int stream_shared_bytes(int rows) {
  return stream_sums_bytes(rows) + 16 + stream_stages(rows) * (stage_bytes(rows, kStreamColumns) + 16);
}

// ---- products over groups of rows: tiles of 128 x 128, of operands that lie across k

constexpr int kCross = 128;
constexpr int kCrossThreads = 32 * (kMathWarps + 4 + 4);
constexpr int kCrossStages = 4, kCrossTurned = 3;  // of both operands as they lie; of b transposed
constexpr int kCrossTile = kCross * kStep;

constexpr int cross_shared_bytes() {
  return kCrossStages * (2 * kCrossTile + 2 * kCross * 4 + 16) + kCrossTurned * (kCrossTile + 16) +
         staging_bytes(kCross);
}

// The columns of a swizzled piece of a staged tile: the most, up to 128 bytes, that divide a warp's.
constexpr int piece_columns(int columns, int bytes) {
  const int span = bytes == 4 ? columns / 2 : columns;
  int piece = 128 / bytes;
  while (span % piece) piece /= 2;
  return piece;
}

}  // namespace moekern::cuda
