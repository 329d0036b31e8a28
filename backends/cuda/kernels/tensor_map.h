// A tensor map, as the driver writes it and the TMA unit reads it. For nvcc and for the host's compiler.
#pragma once
#include <cstdint>

namespace moekern::cuda {

struct alignas(64) TensorMap {
  uint64_t words[16];
};

}  // namespace moekern::cuda
