#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "cpu/gemm/operands.h"
#include "cpu/moe/driver.h"
#include "cpu/parallel.h"
#include "cpu/quant/driver.h"
#include "moekern/routing.h"

namespace moekern::cpu {
namespace {

constexpr int64_t kCachedBytes = 8 << 20;  // more has left the caches before anybody reads it: it is written past them
constexpr int64_t kTaskBytes = 256 << 10;  // long enough to hide handing out the task

int64_t rows_per_task(int64_t row_bytes) { return std::max<int64_t>(kTaskBytes / std::max<int64_t>(row_bytes, 1), 1); }

// Token by token, slot by slot: rows of an expert keep the order of the tokens.
void write_inverse(const PermuteProblem& p) {
  std::vector<int64_t> next(static_cast<size_t>(p.starts.cols));
  for (size_t g = 0; g < next.size(); ++g) next[g] = index_at(p.starts, 0, static_cast<int64_t>(g));
  for (int64_t t = 0; t < p.ids.rows; ++t)
    for (int64_t j = 0; j < p.ids.cols; ++j) {
      const int64_t g = local_expert(p, t, j);
      const int64_t row = g < 0 ? -1 : next[static_cast<size_t>(g)]++;
      *reinterpret_cast<int32_t*>(p.inverse.at(t, j)) = static_cast<int32_t>(row);
    }
}

// Elements in memory, `stride` of them from one to the next.
struct Row {
  const char* data = nullptr;
  int64_t stride = 1;
};

Row row_of(const Matrix& m, int64_t i) { return {m.at(i, 0), m.col_stride}; }

// Writes rows of one matrix.
struct Mover {
  const RoutingIsa& isa;
  const Matrix& to;
  bool past_caches;

  int64_t row_bytes() const { return to.cols * size_of(to.dtype); }
  void write(const Row& row, int64_t target) const {
    char* dst = to.at(target, 0);
    if (row.stride != 1 || to.col_stride != 1) {
      const int64_t size = size_of(to.dtype);
      for (int64_t j = 0; j < to.cols; ++j)
        std::memcpy(to.at(target, j), row.data + j * row.stride * size, static_cast<size_t>(size));
    } else if (past_caches) {
      isa.copy_past_caches(row.data, row_bytes(), dst);
    } else {
      std::memcpy(dst, row.data, static_cast<size_t>(row_bytes()));
    }
  }
};

// What goes to the rows of a token's slots: its own row and scales, or, where they are cast, those in scratch memory.
struct Token {
  Row data, scales;

  Token(const RowOps& rows, const PermuteProblem& p, int64_t t) {
    if (p.casts()) {
      auto* codes = scratch_of<uint8_t>(Slot::own_a, p.out.cols);
      auto* of_blocks = scratch_of<float>(Slot::row, p.sout.values.cols);
      cast_row(rows, p.x, t, p.round_scale_up, p.out.dtype, codes, of_blocks);
      data = {reinterpret_cast<const char*>(codes)};
      scales = {reinterpret_cast<const char*>(of_blocks)};
    } else {
      data = row_of(p.x, t);
      if (p.sx.values) scales = row_of(p.sx.values, t);
    }
  }
};

}  // namespace

void permute(const RowOps& rows, const RoutingIsa& isa, const PermuteProblem& p) {
  write_inverse(p);
  const int64_t row_bytes = p.out.cols * size_of(p.out.dtype), topk = p.ids.cols;
  const bool past_caches = p.ids.rows * topk * row_bytes > kCachedBytes, scaled = static_cast<bool>(p.sout.values);
  const Mover data{isa, p.out, past_caches}, scales{isa, p.sout.values, false};
  const int64_t step = rows_per_task(topk * row_bytes);
  // A token's row is read from memory, and cast, once; it comes from L1 for all slots but the first.
  parallel_for(p.threads, ceil_div(p.ids.rows, step), [&](int64_t task) {
    for (int64_t t = task * step; t < std::min((task + 1) * step, p.ids.rows); ++t) {
      std::optional<Token> token;  // read for the first slot that is kept
      for (int64_t j = 0; j < topk; ++j) {
        const int64_t row = index_at(p.inverse, t, j);
        if (row < 0) continue;
        if (!token) token.emplace(rows, p, t);
        data.write(token->data, row);
        if (scaled) scales.write(token->scales, row);
      }
    }
    if (past_caches) __atomic_thread_fence(__ATOMIC_SEQ_CST);  // streaming stores have no order of their own
  });
  if (p.alignment == 1) return;
  parallel_for(p.threads, p.starts.cols, [&](int64_t g) {
    const int64_t count = index_at(p.counts, 0, g), first = index_at(p.starts, 0, g) + count;
    const int64_t bytes = std::max(data.row_bytes(), scaled ? scales.row_bytes() : 0);
    char* zeros = scratch_of<char>(Slot::row, bytes);
    std::memset(zeros, 0, static_cast<size_t>(bytes));
    for (int64_t row = first; row < first + round_up(count, p.alignment) - count; ++row) {
      data.write({zeros}, row);
      if (scaled) scales.write({zeros}, row);
    }
    if (past_caches) __atomic_thread_fence(__ATOMIC_SEQ_CST);
  });
}

void unpermute(const RoutingIsa& isa, const UnpermuteProblem& p) {
  const int64_t hidden = p.y.cols, topk = p.inverse.cols;
  const bool in_place = p.y.col_stride == 1;
  const int64_t step = rows_per_task(topk * hidden * size_of(p.y.dtype));
  parallel_for(p.threads, ceil_div(p.out.rows, step), [&](int64_t task) {
    const char** rows = scratch_of<const char*>(Slot::own_a, topk);
    float* weights = scratch_of<float>(Slot::own_b, topk);
    float* gathered = in_place ? nullptr : scratch_of<float>(Slot::row, topk * hidden);
    for (int64_t t = task * step; t < std::min((task + 1) * step, p.out.rows); ++t) {
      int count = 0;
      for (int64_t j = 0; j < topk; ++j) {
        const int64_t row = index_at(p.inverse, t, j);
        if (row < 0) continue;
        rows[count] = p.y.at(row, 0);
        if (!in_place) {
          float* values = gathered + count * hidden;
          for (int64_t q = 0; q < hidden; ++q) values[q] = element(p.y, row, q);
          rows[count] = reinterpret_cast<const char*>(values);
        }
        weights[count++] = p.weights ? element(p.weights, t, j) : 1.f;
      }
      if (count == 0)
        std::memset(p.out.at(t, 0), 0, static_cast<size_t>(hidden * size_of(p.out.dtype)));
      else
        isa.weighted_sum(in_place ? p.y.dtype : Dtype::f32, rows, weights, count, hidden, p.out.dtype, p.out.at(t, 0));
    }
  });
}

}  // namespace moekern::cpu
