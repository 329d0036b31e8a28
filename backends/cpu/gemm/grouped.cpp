// The grouped GEMM: one product after another, each with all threads and by the kernel for its number of rows.
#include "cpu/gemm/driver.h"

namespace moekern::cpu {

const char* grouped_refuses(const GemmIsa& packed, const GroupedGemmProblem& p) {
  return packed_refuses(packed, p.shared);
}

void gemm_grouped(const GemmIsa& stream, const GemmIsa& packed, const GroupedGemmProblem& p) {
  const bool streams = stream.stream && !p.batch_invariant;
  for (int64_t g = 0; g < p.count; ++g) {
    const GemmProblem product = p[g];
    if (streams && !stream_refuses(stream, product)) {
      gemm_streamed(stream, product);
    } else {
      gemm_packed(packed, product);
    }
  }
}

}  // namespace moekern::cpu
