// The x86 intrinsics, or their emulation where the build asks for it (MOEKERN_EMULATE_ISA: tests
// execute AVX-512 and AMX kernels on machines without them).
#pragma once
#if defined(MOEKERN_EMULATE_ISA)
#include "emulated_x86.h"  // tests/native
#else
#include <immintrin.h>
#endif
