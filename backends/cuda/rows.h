// How rows lie in memory, and into how many parts they divide.
#pragma once
#include "moekern/tensor_view.h"

namespace moekern::cuda {

constexpr int64_t kPieceBytes = 16;  // of the widest load and store

template <class T>
constexpr T ceil_div(T x, T y) {
  return (x + y - 1) / y;
}

// The least power of two that is not below x, and at most `most`.
constexpr uint32_t power_of_two(int64_t x, uint32_t most) {
  uint32_t power = 1;
  while (power < x && power < most) power *= 2;
  return power;
}

inline bool has_contiguous_rows(const Matrix& m) { return m.cols <= 1 || m.col_stride == 1; }

// Whether rows are contiguous and all begin at a multiple of so many bytes.
inline bool has_rows_at(const Matrix& m, int64_t bytes) {
  return has_contiguous_rows(m) && reinterpret_cast<uintptr_t>(m.data) % static_cast<uintptr_t>(bytes) == 0 &&
         (m.rows <= 1 || m.row_stride * size_of(m.dtype) % bytes == 0);
}

}  // namespace moekern::cuda
