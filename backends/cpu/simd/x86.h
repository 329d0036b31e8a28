// The x86 intrinsics, or their emulation where the build asks for it (MOEKERN_EMULATE_ISA: tests
// execute AVX-512 and AMX kernels on machines without them).
#pragma once
#include <immintrin.h>
