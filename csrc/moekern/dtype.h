// The element types that kernels read and write, by their format names; i32 and i64 index, u8 is memory.
#pragma once
#include <cstdint>
#include <string>

namespace moekern {

enum class Dtype : uint8_t { f32, f16, bf16, e4m3fn, e4m3fnuz, e5m2, ue8m0, i32, i64, u8, other };

constexpr int size_of(Dtype t) {
  switch (t) {
    case Dtype::i64: return 8;
    case Dtype::f32:
    case Dtype::i32: return 4;
    case Dtype::f16:
    case Dtype::bf16: return 2;
    default: return 1;
  }
}

constexpr bool is_fp8(Dtype t) { return t == Dtype::e4m3fn || t == Dtype::e4m3fnuz || t == Dtype::e5m2; }

constexpr bool is_float(Dtype t) { return t == Dtype::f32 || t == Dtype::f16 || t == Dtype::bf16; }

constexpr bool is_index(Dtype t) { return t == Dtype::i32 || t == Dtype::i64; }

constexpr const char* name_of(Dtype t) {
  switch (t) {
    case Dtype::f32: return "f32";
    case Dtype::f16: return "f16";
    case Dtype::bf16: return "bf16";
    case Dtype::e4m3fn: return "e4m3fn";
    case Dtype::e4m3fnuz: return "e4m3fnuz";
    case Dtype::e5m2: return "e5m2";
    case Dtype::ue8m0: return "ue8m0";
    case Dtype::i32: return "i32";
    case Dtype::i64: return "i64";
    case Dtype::u8: return "u8";
    default: return "unsupported dtype";
  }
}

// The dtype of that name, or `other`.
inline Dtype dtype_named(const std::string& name) {
  for (int i = 0; i < static_cast<int>(Dtype::other); ++i)
    if (name == name_of(static_cast<Dtype>(i))) return static_cast<Dtype>(i);
  return Dtype::other;
}

}  // namespace moekern
