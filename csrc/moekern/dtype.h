// The element types that kernels read and write, by their format names.
#pragma once
#include <cstdint>

namespace moekern {

enum class Dtype : uint8_t { f32, f16, bf16, e4m3fn, e4m3fnuz, e5m2, ue8m0, other };

constexpr int size_of(Dtype t) {
  switch (t) {
    case Dtype::f32: return 4;
    case Dtype::f16:
    case Dtype::bf16: return 2;
    default: return 1;
  }
}

constexpr bool is_fp8(Dtype t) { return t == Dtype::e4m3fn || t == Dtype::e4m3fnuz || t == Dtype::e5m2; }

constexpr bool is_float(Dtype t) { return t == Dtype::f32 || t == Dtype::f16 || t == Dtype::bf16; }

constexpr const char* name_of(Dtype t) {
  switch (t) {
    case Dtype::f32: return "f32";
    case Dtype::f16: return "f16";
    case Dtype::bf16: return "bf16";
    case Dtype::e4m3fn: return "e4m3fn";
    case Dtype::e4m3fnuz: return "e4m3fnuz";
    case Dtype::e5m2: return "e5m2";
    case Dtype::ue8m0: return "ue8m0";
    default: return "unsupported dtype";
  }
}

}  // namespace moekern
