#include "cpu/limits/driver.h"

#include <algorithm>
#include <atomic>

#include "cpu/parallel.h"

namespace moekern::cpu {
namespace {

// 4096 rounds of 12 or 24 FMAs take about 10 us: long beside handing out a task, and short enough
// that all threads end together.
constexpr int64_t kRounds = 4096, kTasksPerThread = 128;
constexpr int64_t kPieceBytes = 256 << 10;  // a sequential run for the prefetcher, like a task of the GEMM

template <class Body>
void for_each_piece(int threads, int64_t bytes, const Body& body) {
  parallel_for(threads, (bytes + kPieceBytes - 1) / kPieceBytes,
               [&](int64_t piece) { body(piece * kPieceBytes, std::min(kPieceBytes, bytes - piece * kPieceBytes)); });
}

}  // namespace

int64_t limit_multiply_add(const LimitIsa& isa, int threads) {
  std::atomic<int64_t> flops{0};
  parallel_for(threads, threads * kTasksPerThread, [&](int64_t) { flops += isa.multiply_add(kRounds); });
  return flops;
}

void limit_read(const LimitIsa& isa, int loop, const char* src, int64_t bytes, int threads) {
  for_each_piece(threads, bytes, [&](int64_t first, int64_t count) { isa.read[loop](src + first, count); });
}

void limit_copy(const LimitIsa& isa, const char* src, int64_t bytes, char* dst, int threads) {
  for_each_piece(threads, bytes, [&](int64_t first, int64_t count) { isa.copy(src + first, count, dst + first); });
}

}  // namespace moekern::cpu
