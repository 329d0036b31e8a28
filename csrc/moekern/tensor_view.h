// Borrowed views of a caller's memory. They own nothing and live for one call.
#pragma once
#include <cstdint>

#include "moekern/dtype.h"

namespace moekern {

// A matrix with free strides, counted in elements.
struct Matrix {
  char* data = nullptr;
  Dtype dtype = Dtype::other;
  int64_t rows = 0, cols = 0;
  int64_t row_stride = 0, col_stride = 0;

  char* at(int64_t row, int64_t col) const { return data + (row * row_stride + col * col_stride) * size_of(dtype); }
  explicit operator bool() const { return data != nullptr; }
};

// `count` matrices alike, `stride` elements from one to the next.
struct Stack {
  Matrix matrix;  // the first
  int64_t count = 1, stride = 0;

  char* data(int64_t i) const { return matrix.data + i * stride * size_of(matrix.dtype); }
};

// An element of an i32 or i64 matrix.
inline int64_t index_at(const Matrix& m, int64_t row, int64_t col) {
  const char* at = m.at(row, col);
  return m.dtype == Dtype::i64 ? *reinterpret_cast<const int64_t*>(at) : *reinterpret_cast<const int32_t*>(at);
}

// values(i, j) is the decode multiplier of the block_rows x block_cols block (i, j): x ~ q * s.
struct ScaleGrid {
  Matrix values;  // f32 or ue8m0; empty when the operand has no scale
  int64_t block_rows = 1, block_cols = 1;
};

}  // namespace moekern
