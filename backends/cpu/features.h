// What this CPU and its operating system can execute, found at run time.
#pragma once
#include <cstdint>

#include "moekern/kernel.h"

namespace moekern::cpu {

namespace feature {
enum : uint64_t {
  none = 0,
  avx2 = 1 << 0,    // AVX2 + FMA + F16C
  avx512 = 1 << 1,  // AVX-512 F, BW, VL, DQ
  avx512_vbmi = 1 << 2,
  avx512_bf16 = 1 << 3,
  amx_bf16 = 1 << 4,  // tiles and bf16, with the kernel's permission to use them
  neon = 1 << 5,
  neon_bf16 = 1 << 6,  // FEAT_BF16
  sve_256 = 1 << 7,    // SVE with 256-bit vectors
};
}  // namespace feature

inline constexpr Feature kFeatures[] = {
    {feature::avx2, "avx2"},
    {feature::avx512, "avx512"},
    {feature::avx512_vbmi, "avx512_vbmi"},
    {feature::avx512_bf16, "avx512_bf16"},
    {feature::amx_bf16, "amx_bf16"},
    {feature::neon, "neon"},
    {feature::neon_bf16, "neon_bf16"},
    {feature::sve_256, "sve_256"},
};

uint64_t detect_features();

}  // namespace moekern::cpu
