// Many products in one parallel region, block of columns by block: the grouped GEMMs and fused_experts.
#pragma once
#include <vector>

#include "cpu/gemm/driver.h"
#include "cpu/gemm/packed.h"
#include "cpu/gemm/streamed.h"

namespace moekern::cpu {

// Rows of a product that a task takes, when they are packed.
int64_t packed_part_rows(const GemmIsa& packed, int64_t k);

// Rows [first, first + rows) of a product.
struct Part {
  const GemmProblem* product;
  int64_t first, rows;
  bool streamed;
  StreamedActivations activations;  // of all the product's rows, if streamed
};

// sums[i * ld + j] = row first + i of the product, column j0 + j; ld is returned. `next` is where the weights that the
// thread takes next begin. Rows to be packed are packed by `pack_part` first, in the thread's own memory: anew
// for every task, which costs 1 to 2% of multiplying them with 128 columns.
PackedActivations pack_part(const GemmPair& isa, const Part& part);
int64_t multiply_part(const GemmPair& isa, const Part& part, const PackedActivations& packed, int64_t j0, int64_t cols,
                      const char* next, float* sums);
inline int64_t sums_room(const GemmPair& isa, int64_t rows, int64_t cols) {
  return rows * round_up(cols, isa.packed->nr);
}

// The tasks of a region: blocks of columns of every part, part after part.
class Blocks {
 public:
  void add(int64_t cols, int64_t width) {
    begin_.push_back(count_);
    width_.push_back(width);
    count_ += ceil_div(cols, width);
  }
  int64_t count() const { return count_; }

  struct Block {
    size_t part;
    int64_t first, width;  // columns; the last block of a part may have fewer
  };
  Block operator[](int64_t task) const;

 private:
  std::vector<int64_t> begin_, width_;
  int64_t count_ = 0;
};

}  // namespace moekern::cpu
