// Packed GEMM over bf16 for AArch64 with FEAT_BF16 (Neoverse N2, V1 and later, Apple M2 and later).
//
// e4m3 and e5m2 values are bf16 values, so strips hold them exactly. BFMMLA multiplies two rows of four
// by four columns of two, 16 multiply-adds an instruction where FMLA does 4. P row pairs times 8
// column pairs: 3 x 8 is 24 accumulators + 3 of a + 1 of b in 32 registers; 14 loads feed 24 products.
//
// BFMMLA rounds every sum of two products to odd, not to nearest: an f32 accumulation whose single
// rounding may err by one unit in the last place instead of half of one.
#include "cpu/simd/neon.h"

#include "cpu/gemm/decode.h"
#include "cpu/gemm/ukernel.h"
#include "cpu/rows.h"

namespace moekern::cpu {
namespace {

constexpr int MR = 6, NR = 16, KR = 4;

// Four consecutive k of a row are a group of 8 bytes, and a vector holds those of two rows.
template <Dtype F>
bool pack_format(const uint8_t* const* rows, int kc, uint16_t* strip) {
  const F32 scale = as_f32(set1_i32(static_cast<uint32_t>(254 - layout_of(F).bias) << 23));  // 2^(127 - bias)
  Special<F> special;
  for (int r = 0; r < NR; r += 2) {
    for (int k = 0; k < kc; k += 4 * W) {
      uint64x2_t groups[2][2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const I32 x = load_bytes(rows[r + i] + k);
        special.see(x);
        F32 w[4];  // w[j] lane g: element 4g + j, and its bf16 in the upper half
        Decode<F>::lanes(x, w);
        I32 u[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) u[j] = bits(mul(w[j], scale));
        const I32 low = vsriq_n_u32(u[1], u[0], 16), high = vsriq_n_u32(u[3], u[2], 16);
        groups[i][0] = vreinterpretq_u64_u32(vzip1q_u32(low, high));
        groups[i][1] = vreinterpretq_u64_u32(vzip2q_u32(low, high));
      }
      uint16_t* out = strip + k * NR + r * KR;
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        store_i32(out + 2 * half * NR * KR, vreinterpretq_u32_u64(vzip1q_u64(groups[0][half], groups[1][half])));
        store_i32(out + (2 * half + 1) * NR * KR, vreinterpretq_u32_u64(vzip2q_u64(groups[0][half], groups[1][half])));
      }
    }
  }
  return special.found();
}

bool pack(Dtype format, const uint8_t* const* rows, int kc, void* strip) {
  auto* out = static_cast<uint16_t*>(strip);
  switch (format) {
    case Dtype::e5m2: return pack_format<Dtype::e5m2>(rows, kc, out);
    case Dtype::e4m3fnuz: return pack_format<Dtype::e4m3fnuz>(rows, kc, out);
    default: return pack_format<Dtype::e4m3fn>(rows, kc, out);
  }
}

// Row 2 P - 1 of an odd number of rows is computed as a copy of the last one and dropped.
template <int P>
inline void tile_pairs(int mr, int kc, const uint16_t* a, int64_t a_stride, const uint16_t* b, const float* row_scale,
                       const float* scale, float* c, int64_t ldc) {
  F32 acc[P][NR / 2];
  const uint16_t* rows[2 * P];
#pragma GCC unroll 3
  for (int i = 0; i < P; ++i) {
    rows[2 * i] = a + 2 * i * a_stride;
    rows[2 * i + 1] = 2 * i + 1 < mr ? rows[2 * i] + a_stride : rows[2 * i];
#pragma GCC unroll 8
    for (int j = 0; j < NR / 2; ++j) acc[i][j] = zero();
  }
  for (int p = 0; p < kc; p += KR, b += NR * KR) {
    bfloat16x8_t av[P];
#pragma GCC unroll 3
    for (int i = 0; i < P; ++i)
      av[i] = vreinterpretq_bf16_u16(vcombine_u16(vld1_u16(rows[2 * i] + p), vld1_u16(rows[2 * i + 1] + p)));
#pragma GCC unroll 8
    for (int j = 0; j < NR / 2; ++j) {
      const bfloat16x8_t bv = vreinterpretq_bf16_u16(vld1q_u16(b + j * 2 * KR));
#pragma GCC unroll 3
      for (int i = 0; i < P; ++i) acc[i][j] = vbfmmlaq_f32(acc[i][j], av[i], bv);
    }
  }
  const auto add_row = [&](int row, int v, float64x2_t low_high) {
    float* out = c + row * ldc + v * W;
    const F32 sums = vreinterpretq_f32_f64(low_high);
    store(out, fma(mul(sums, set1(row_scale[row])), load(scale + v * W), load(out)));
  };
#pragma GCC unroll 3
  for (int i = 0; i < P; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NR / W; ++v) {
      const float64x2_t left = vreinterpretq_f64_f32(acc[i][2 * v]), right = vreinterpretq_f64_f32(acc[i][2 * v + 1]);
      add_row(2 * i, v, vzip1q_f64(left, right));
      if (2 * i + 1 < mr) add_row(2 * i + 1, v, vzip2q_f64(left, right));
    }
}

template <int P = MR / 2>
void tile(int mr, int kc, const void* a, int64_t a_stride, const void* b, const float* row_scale, const float* scale,
          float* c, int64_t ldc) {
  if constexpr (P > 1) {
    if (mr <= 2 * (P - 1)) return tile<P - 1>(mr, kc, a, a_stride, b, row_scale, scale, c, ldc);
  }
  tile_pairs<P>(mr, kc, static_cast<const uint16_t*>(a), a_stride, static_cast<const uint16_t*>(b), row_scale, scale, c,
                ldc);
}

}  // namespace

extern const GemmIsa k_neon_bf16;
constexpr GemmIsa k_neon_bf16 = {&kRowOps, Dtype::bf16, W, MR, NR, KR, pack, tile<>, nullptr};

}  // namespace moekern::cpu
