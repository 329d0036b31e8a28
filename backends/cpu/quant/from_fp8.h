// Rows of FP8 with block scales -> f32, f16 or bf16, written once over the vector vocabulary.
#pragma once

// Included after one simd/*.h: everything here is per ISA.
#include "cpu/elements.h"
#include "cpu/gemm/decode.h"
#include "cpu/gemm/ukernel.h"
#include "moekern/float_formats.h"

namespace moekern::cpu {
namespace {

// W bytes -> value * 2^-(127 - bias), as gemm/decode.h has it.
template <Dtype F>
inline F32 decode_lanes(const uint8_t* p) {
  return as_f32(bit_and(sra32<Decode<F>::kShift>(shl32<24>(load_u8(p))), set1_i32(Decode<F>::kMask)));
}

// 2W bytes -> the same in bf16.
template <Dtype F>
inline I32 decode_words(const uint8_t* p) {
  return bit_and(sra16<Decode<F>::kShift>(shl16<8>(load_u8_i16(p))), set1_i16(Decode<F>::kMask >> 16));
}

// The bits of x rounded to bf16, as a signed integer. x is no NaN.
inline I32 round_to_i16(F32 x) {
  const I32 u = bits(x), odd = bit_and(shr32<16>(u), set1_i32(1));
  return sra32<16>(add_i32(add_i32(u, set1_i32(0x7fff)), odd));
}

template <bool kPastCaches>
inline void store_words(void* dst, I32 x) {
  kPastCaches ? store_past_caches(dst, x) : store_i32(dst, x);
}

// As many elements of [i, end) as fill 4 vectors, with one scale; returns where it stopped.
template <Dtype From, Dtype To, bool kPastCaches>
inline int64_t dequantize_run(const uint8_t* x, int64_t i, int64_t end, float scale, char* dst,
                              Special<From>& special) {
  const F32 factor = as_f32(set1_i32(static_cast<uint32_t>(254 - layout_of(From).bias) << 23)), s = set1(scale);
  for (; i + 4 * W <= end; i += 4 * W) {
    special.see(load_bytes(x + i));
    if constexpr (To == Dtype::bf16) {
#pragma GCC unroll 2
      for (int64_t j = i; j < i + 4 * W; j += 2 * W) {
        const I32 words = decode_words<From>(x + j);
        const F32 lower = mul(mul(bf16_lower(words), factor), s), upper = mul(mul(bf16_upper(words), factor), s);
        store_words<kPastCaches>(dst + 2 * j, narrow_i32(round_to_i16(lower), round_to_i16(upper)));
      }
    } else {
#pragma GCC unroll 4
      for (int64_t j = i; j < i + 4 * W; j += W) {
        const F32 y = mul(mul(decode_lanes<From>(x + j), factor), s);
        if constexpr (To == Dtype::f16) {
          store_f16(reinterpret_cast<uint16_t*>(dst) + j, y);
        } else {
          store_words<kPastCaches>(dst + 4 * j, bits(y));
        }
      }
    }
  }
  return i;
}

// A row with a NaN or an infinity is done again, slowly.
template <Dtype From, Dtype To, bool kPastCaches>
void dequantize_row(const uint8_t* x, const float* scale, int64_t block, bool finite, int64_t n, char* dst) {
  Special<From> special;
  const auto row = [&](bool fast) {
    for (int64_t i = 0, b = 0; i < n; ++b) {
      const int64_t end = n - i < block ? n : i + block;
      if (fast) i = dequantize_run<From, To, kPastCaches>(x, i, end, scale[b], dst, special);
      for (; i < end; ++i) store_element_as<To>(dst, i, fp8_to_f32(From, x[i]) * scale[b]);
    }
  };
  row(finite);
  if (special.found()) row(false);
}

template <Dtype From>
inline void dequantize_from(Dtype to, const uint8_t* x, const float* scale, int64_t block, bool finite, int64_t n,
                            char* dst, bool past_caches) {
  const auto run = [&](auto plain, auto past) { (past_caches ? past : plain)(x, scale, block, finite, n, dst); };
  switch (to) {
    case Dtype::bf16: return run(dequantize_row<From, Dtype::bf16, false>, dequantize_row<From, Dtype::bf16, true>);
    case Dtype::f16: return run(dequantize_row<From, Dtype::f16, false>, dequantize_row<From, Dtype::f16, false>);
    default: return run(dequantize_row<From, Dtype::f32, false>, dequantize_row<From, Dtype::f32, true>);
  }
}

void row_dequantize(Dtype from, Dtype to, const uint8_t* x, const float* scale, int64_t block, bool finite, int64_t n,
                    char* dst, bool past_caches) {
  switch (from) {
    case Dtype::e4m3fn: return dequantize_from<Dtype::e4m3fn>(to, x, scale, block, finite, n, dst, past_caches);
    case Dtype::e5m2: return dequantize_from<Dtype::e5m2>(to, x, scale, block, finite, n, dst, past_caches);
    default: return dequantize_from<Dtype::e4m3fnuz>(to, x, scale, block, finite, n, dst, past_caches);
  }
}

}  // namespace
}  // namespace moekern::cpu
