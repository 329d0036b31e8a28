#include "cpu/gemm/products.h"

#include <algorithm>

#include "cpu/parallel.h"

namespace moekern::cpu {

int64_t packed_part_rows(const GemmIsa& packed, int64_t k) {
  constexpr int64_t kPanelBytes = 4 << 20;
  return std::clamp<int64_t>(kPanelBytes / packed_bytes(packed.panel, 1, k), packed.mr, kTaskRows);
}

PackedActivations pack_part(const GemmPair& isa, const Part& part) {
  if (part.streamed) return {};
  const GemmProblem& p = *part.product;
  const int64_t bytes = packed_bytes(isa.packed->panel, part.rows, p.k());
  const PackedActivations a =
      packed_activations(isa.packed->panel, part.rows, p.k(), scratch_of<char>(Slot::panel, bytes));
  for (int64_t i = 0; i < part.rows; ++i) pack_activations(*isa.packed, p, part.first + i, a, i);
  return a;
}

int64_t multiply_part(const GemmPair& isa, const Part& part, const PackedActivations& packed, int64_t j0, int64_t cols,
                      const char* next, float* sums) {
  if (part.streamed) {
    streamed_block(*isa.stream, *part.product, part.activations, j0, cols, next, sums, cols);
    return cols;
  }
  packed_block(*isa.packed, *part.product, packed, 0, part.rows, j0, cols, sums);
  return round_up(cols, isa.packed->nr);
}

Blocks::Block Blocks::operator[](int64_t task) const {
  const auto part = static_cast<size_t>(std::upper_bound(begin_.begin(), begin_.end(), task) - begin_.begin()) - 1;
  return {part, (task - begin_[part]) * width_[part], width_[part]};
}

}  // namespace moekern::cpu
