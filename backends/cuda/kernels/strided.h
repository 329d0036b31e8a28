// A matrix as kernels see it, with steps in bytes. Read by the host's compiler and by nvcc.
#pragma once
#include <cstdint>

#include "moekern/dtype.h"

namespace moekern::cuda {

struct Strided {
  char* data;
  int64_t row_step, col_step;
  Dtype dtype;
};

}  // namespace moekern::cuda
