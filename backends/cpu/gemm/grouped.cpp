// The grouped GEMM: blocks of columns of all groups in one parallel region, each by the kernel for its number of rows.
#include <algorithm>
#include <vector>

#include "cpu/gemm/products.h"
#include "cpu/parallel.h"

namespace moekern::cpu {
namespace {

constexpr int64_t kStreamedBytes = 32 << 20;  // of activations normalised for a region: groups beyond go to the next

// The groups [first, last) as one region.
void run_region_of(const GemmPair& isa, const std::vector<GemmProblem>& products, size_t first, size_t last,
                   int threads) {
  struct Row {
    size_t part;
    int64_t row;
  };
  std::vector<Part> parts;
  std::vector<Row> streamed;
  int64_t bytes = 0, columns = 0;
  for (size_t g = first; g < last; ++g) {
    const GemmProblem& p = products[g];
    const bool few = streams(isa, p);
    const int64_t count = few ? 1 : ceil_div(p.m(), packed_part_rows(*isa.packed, p.k()));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t from = p.m() * i / count;
      parts.push_back({&p, from, p.m() * (i + 1) / count - from, few, {}});
      columns += p.n();
    }
    if (!few) continue;
    for (int64_t i = 0; i < p.m(); ++i) streamed.push_back({parts.size() - 1, i});
    bytes += round_up(streamed_bytes(*isa.stream, p.m(), p.k()), 64);
  }
  char* memory = scratch_of<char>(Slot::shared_a, bytes);
  for (Part& part : parts) {
    if (!part.streamed) continue;
    part.activations = streamed_activations(*isa.stream, part.rows, part.product->k(), memory);
    memory += round_up(streamed_bytes(*isa.stream, part.rows, part.product->k()), 64);
  }
  parallel_for(threads, static_cast<int64_t>(streamed.size()), [&](int64_t i) {
    const Row& r = streamed[static_cast<size_t>(i)];
    stream_activations(*isa.stream, *parts[r.part].product, r.row, parts[r.part].activations, r.row);
  });
  const int64_t width = streamed_task_rows(columns, threads);
  Blocks blocks;
  for (const Part& part : parts) blocks.add(part.product->n(), part.streamed ? width : kTaskCols);
  parallel_for(threads, blocks.count(), [&](int64_t task) {
    const Blocks::Block block = blocks[task];
    const Part& part = parts[block.part];
    const GemmProblem& p = *part.product;
    const int64_t cols = std::min(block.width, p.n() - block.first), end = block.first + cols;
    float* sums = scratch_of<float>(Slot::own_sums, sums_room(isa, part.rows, cols));
    const bool last_of_part = end == p.n() && block.part + 1 < parts.size();
    const char* next = last_of_part ? parts[block.part + 1].product->b.data : p.b.at(end, 0);
    const int64_t ld = multiply_part(isa, part, pack_part(isa, part), block.first, cols, next, sums);
    for (int64_t i = 0; i < part.rows; ++i)
      write_row(*isa.packed->rows, p, part.first + i, block.first, cols, sums + i * ld);
  });
}

}  // namespace

const char* grouped_refuses(const GemmPair& isa, const GroupedGemmProblem& p) {
  if (const char* reason = packed_refuses(*isa.packed, p.shared)) return reason;
  if (!isa.stream) return nullptr;
  int64_t fewest = p.groups[0].m;
  for (int64_t g = 1; g < p.count; ++g) fewest = std::min(fewest, p.groups[g].m);
  GemmProblem smallest = p.shared;
  smallest.a.rows = fewest;
  return stream_refuses(*isa.stream, smallest);
}

void gemm_grouped(const GemmPair& isa, const GroupedGemmProblem& p) {
  std::vector<GemmProblem> products;
  for (int64_t g = 0; g < p.count; ++g)
    if (p.groups[g].m > 0) products.push_back(p[g]);
  int64_t bytes = 0;
  size_t first = 0;
  for (size_t g = 0; g < products.size(); ++g) {
    const int64_t own = streams(isa, products[g]) ? streamed_bytes(*isa.stream, products[g].m(), products[g].k()) : 0;
    if (g > first && bytes + own > kStreamedBytes) {
      run_region_of(isa, products, first, g, p.threads);
      first = g;
      bytes = 0;
    }
    bytes += own;
  }
  if (first < products.size()) run_region_of(isa, products, first, products.size(), p.threads);
}

}  // namespace moekern::cpu
