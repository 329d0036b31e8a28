// Floats in memory and in registers: one at a time, or 16 bytes of a row. Two 16-bit ones share a register, the first
// in its lower half.
#pragma once
#include "cuda/kernels/strided.h"

namespace moekern::cuda {

__device__ inline char* at(const Strided& m, int64_t row, int64_t col) {
  return m.data + row * m.row_step + col * m.col_step;
}

__device__ inline float bf16_to_f32(uint32_t bits) { return __uint_as_float(bits << 16); }

__device__ inline float f16_to_f32(uint32_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(bits)));
  return x;
}

__device__ inline uint32_t f32_to_bf16x2(float lower, float upper) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(upper), "f"(lower));
  return pair;
}

__device__ inline uint32_t f32_to_f16x2(float lower, float upper) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(upper), "f"(lower));
  return pair;
}

__device__ inline float load_float(const char* at, Dtype dtype) {
  switch (dtype) {
    case Dtype::f32: return *reinterpret_cast<const float*>(at);
    case Dtype::f16: return f16_to_f32(*reinterpret_cast<const uint16_t*>(at));
    default: return bf16_to_f32(*reinterpret_cast<const uint16_t*>(at));
  }
}

__device__ inline void store_float(char* at, Dtype dtype, float x) {
  switch (dtype) {
    case Dtype::f32: *reinterpret_cast<float*>(at) = x; break;
    case Dtype::f16: *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>(f32_to_f16x2(x, 0)); break;
    default: *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>(f32_to_bf16x2(x, 0)); break;
  }
}

// An i32 or i64.
__device__ inline int64_t load_index(const char* at, Dtype dtype) {
  return dtype == Dtype::i64 ? *reinterpret_cast<const int64_t*>(at) : *reinterpret_cast<const int32_t*>(at);
}

constexpr int kPieceBytes = 16;
template <Dtype F> constexpr int kPerPiece = F == Dtype::f32 ? 4 : 8;  // elements of a piece

struct alignas(16) Piece {
  uint32_t words[4];
};

// Past the first-level cache: nobody reads it twice.
__device__ inline Piece load_piece(const char* at) {
  Piece p;
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(p.words[0]), "=r"(p.words[1]), "=r"(p.words[2]), "=r"(p.words[3])
               : "l"(at));
  return p;
}

template <Dtype F>
__device__ inline float element(const Piece& p, int i) {
  if constexpr (F == Dtype::f32) return __uint_as_float(p.words[i]);
  const uint32_t word = p.words[i / 2];
  if constexpr (F == Dtype::f16) return f16_to_f32(i % 2 ? word >> 16 : word);
  return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
}

}  // namespace moekern::cuda
