// The machine's limits, which bench/ holds the kernels against: one ISA's loops on all threads.
#pragma once
#include <cstdint>

#include "moekern/kernel.h"

namespace moekern::cpu {

// Filled by limits/<isa>.cpp, from limits/loops.h.
struct LimitIsa {
  int64_t (*multiply_add)(int64_t rounds);  // returns the floating-point operations done
  void (*read[kReadLoops])(const char* src, int64_t bytes);
  void (*copy)(const char* src, int64_t bytes, char* dst);
};

// About a millisecond of multiply-adds on each thread; returns the operations done.
int64_t limit_multiply_add(const LimitIsa& isa, int threads);
void limit_read(const LimitIsa& isa, int loop, const char* src, int64_t bytes, int threads);
void limit_copy(const LimitIsa& isa, const char* src, int64_t bytes, char* dst, int threads);

}  // namespace moekern::cpu
