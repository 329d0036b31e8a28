// Operands as kernels take them.
#pragma once
#include "cuda/kernels/strided.h"
#include "moekern/tensor_view.h"

namespace moekern::cuda {

inline Strided strided(const Matrix& m) {
  return {m.data, m.row_stride * size_of(m.dtype), m.col_stride * size_of(m.dtype), m.dtype};
}

}  // namespace moekern::cuda
