#include "cpu/features.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#include <sys/prctl.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace moekern::cpu {
namespace {

#if defined(__x86_64__)
// The tile registers cost 8 KiB of state per thread, so Linux enables them only for a process that
// asks (arch_prctl ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA); CPUID alone says nothing of that.
bool amx_bf16_permitted() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if ((d & (kAmxBf16 | kAmxTile)) != (kAmxBf16 | kAmxTile)) return false;
#if defined(__linux__)
  constexpr int kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

uint64_t detect_features() {
  uint64_t found = feature::none;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // These builtins check XGETBV too: a feature whose registers the kernel does not save is absent.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    unsigned a, b, c, d;
    constexpr unsigned kF16c = 1u << 29;
    if (__get_cpuid(1, &a, &b, &c, &d) && (c & kF16c)) found |= feature::avx2;
  }
#if defined(MOEKERN_EMULATE_ISA)
  if (found & feature::avx2)
    return found | feature::avx512 | feature::avx512_vbmi | feature::avx512_bf16 | feature::amx_bf16;
#endif
  if ((found & feature::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    found |= feature::avx512;
    if (__builtin_cpu_supports("avx512vbmi")) found |= feature::avx512_vbmi;
    if (__builtin_cpu_supports("avx512bf16")) found |= feature::avx512_bf16;
    if (amx_bf16_permitted()) found |= feature::amx_bf16;
  }
#elif defined(__aarch64__)
  found |= feature::neon;
#if defined(__linux__)
  constexpr unsigned long kHwcapSve = 1ul << 22, kHwcap2Bf16 = 1ul << 14;
  constexpr int kPrSveGetVl = 51, kVlMask = 0xffff;
  if (getauxval(AT_HWCAP2) & kHwcap2Bf16) found |= feature::neon_bf16;
  if (getauxval(AT_HWCAP) & kHwcapSve) {
    const int vl = prctl(kPrSveGetVl, 0, 0, 0, 0);
    if (vl > 0 && (vl & kVlMask) == 32) found |= feature::sve_256;
  }
#endif
#endif
  return found;
}

}  // namespace moekern::cpu
