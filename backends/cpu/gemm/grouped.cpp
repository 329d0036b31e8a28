// The grouped GEMM: one product after another, each with all threads and by the kernel for its number of rows.
#include <algorithm>

#include "cpu/gemm/driver.h"

namespace moekern::cpu {

const char* grouped_refuses(const GemmIsa* stream, const GemmIsa& packed, const GroupedGemmProblem& p) {
  if (const char* reason = packed_refuses(packed, p.shared)) return reason;
  if (!stream) return nullptr;
  int64_t fewest = p.groups[0].m;
  for (int64_t g = 1; g < p.count; ++g) fewest = std::min(fewest, p.groups[g].m);
  GemmProblem smallest = p.shared;
  smallest.a.rows = fewest;
  return stream_refuses(*stream, smallest);
}

void gemm_grouped(const GemmIsa* stream, const GemmIsa& packed, const GroupedGemmProblem& p) {
  for (int64_t g = 0; g < p.count; ++g) {
    const GemmProblem product = p[g];
    if (stream && !stream_refuses(*stream, product)) {
      gemm_streamed(*stream, product);
    } else {
      gemm_packed(packed, product);
    }
  }
}

}  // namespace moekern::cpu
