// How an expert's gate and up products become its hidden state.
#pragma once
#include <cmath>
#include <cstdint>

namespace moekern {

enum class Activation : uint8_t { swiglu, gelu, gelu_tanh };

// With g = min(gate, limit) and u = clamp(up, +-limit): (u + beta) g sigmoid(alpha g), or gelu(g) (u + beta).
struct Gating {
  Activation activation = Activation::swiglu;
  float alpha = 1, beta = 0, limit = INFINITY;
};

}  // namespace moekern
