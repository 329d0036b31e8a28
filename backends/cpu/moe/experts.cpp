// fused_experts: two parallel regions over the experts that are hit, with no row of x or of the result copied.
//
//   for each chunk of tokens                    as many as the hidden states of all their slots fit in memory
//     slots sorted by expert, within an expert in their own order; x quantised on demand
//     parallel over (expert, block of its hidden state)
//       gate, up = the expert's rows of x times its weights
//       h = gating(gate, up)                    in the order of the sorted slots, rounded to x's dtype
//     h quantised on demand
//     parallel over blocks of the result's columns
//       for each expert                         weights[slot] * (its rows of h times its weights) is added to
//                                               the tokens' sums, in f32
//       out = the tokens' sums
//
// An expert with few rows takes the streaming GEMM, any other the packed one. The threads of one expert share its
// weights, so a single token keeps all of them busy.
#include "cpu/moe/experts.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/gemm/driver.h"
#include "cpu/gemm/packed.h"
#include "cpu/gemm/streamed.h"
#include "cpu/parallel.h"
#include "cpu/quant/driver.h"

namespace moekern::cpu {
namespace {

constexpr int64_t kChunkBytes = 64 << 20;  // of a chunk's hidden states, and of its normalised x
constexpr int64_t kPanelBytes = 4 << 20;   // of the activations that a thread packs for one expert
constexpr int64_t kResultCols = 64;        // of a task's sums, for all tokens of a chunk

bool is_quantised(const ExpertsProblem& p) { return p.quantize || is_fp8(p.x.dtype); }

Matrix dense(void* data, Dtype dtype, int64_t rows, int64_t cols) {
  return {static_cast<char*>(data), dtype, rows, cols, cols, 1};
}

// An expert with some of its slots: all, but for a packed expert with more rows than a task takes.
struct Group {
  const Expert* expert;
  int64_t first, rows;  // in the order of the sorted slots
  bool routed;          // false: shared, of weight 1
  bool streamed;
  GemmProblem gate, up, down;
};

// The memory of a call that all threads share, in one piece.
struct Memory {
  int64_t chunk;      // tokens
  int64_t slots;      // of a chunk, those of the shared experts included
  int32_t* token_of;  // [slots] row of x
  int32_t* slot_of;   // [slots] token * k + j
  int64_t* begin;     // [num_experts + 1], of each expert's slots
  uint8_t* xq;        // [chunk][hidden]
  float* sx;          // [chunk][hidden / 128]
  char* h;            // [slots][intermediate], in x's dtype, or f32 to be quantised
  uint8_t* hq;        // [slots][intermediate]
  float* sh;          // [slots][intermediate / 128]
  int64_t bytes = 0;

  Memory(const ExpertsProblem& p, char* memory) {
    const bool quantised = is_quantised(p);
    const int64_t per_token = p.top_k() + p.num_shared, hidden = p.hidden();
    int64_t intermediate = p.experts->gate.count;
    if (p.num_shared) intermediate = std::max(intermediate, p.shared->gate.count);
    const int64_t h_bytes = quantised ? 5 : size_of(p.x.dtype);
    const int64_t token_bytes =
        std::max<int64_t>({per_token * intermediate * h_bytes, hidden * static_cast<int64_t>(sizeof(float)), 1});
    chunk = std::min(p.tokens(), std::max<int64_t>(kChunkBytes / token_bytes, 1));
    slots = chunk * per_token;
    take(token_of, memory, slots);
    take(slot_of, memory, slots);
    take(begin, memory, p.num_experts + 1);
    take(xq, memory, p.quantize && !p.sx.values ? chunk * hidden : 0);
    take(sx, memory, p.quantize && !p.sx.values ? chunk * ceil_div(hidden, kBlock) : 0);
    take(h, memory, slots * intermediate * (quantised ? static_cast<int64_t>(sizeof(float)) : h_bytes));
    take(hq, memory, quantised ? slots * intermediate : 0);
    take(sh, memory, quantised ? slots * ceil_div(intermediate, kBlock) : 0);
  }

 private:
  template <class T>
  void take(T*& pointer, char* memory, int64_t count) {
    pointer = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes));
    bytes += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
  }
};

// The tasks of one region: blocks of columns of every group, group after group.
class Blocks {
 public:
  void add(int64_t cols, int64_t width) {
    begin_.push_back(count_);
    width_.push_back(width);
    count_ += ceil_div(cols, width);
  }
  int64_t count() const { return count_; }
  size_t group(int64_t task) const {
    return static_cast<size_t>(std::upper_bound(begin_.begin(), begin_.end(), task) - begin_.begin()) - 1;
  }
  int64_t first_col(int64_t task, size_t group) const { return (task - begin_[group]) * width_[group]; }
  int64_t width(size_t group) const { return width_[group]; }

 private:
  std::vector<int64_t> begin_, width_;
  int64_t count_ = 0;
};

// The activations of the group that a thread packed last.
const PackedActivations& packed_rows(const GemmIsa& isa, const GemmProblem& p, uint64_t call, const Group* group) {
  static thread_local struct {
    uint64_t call = 0;
    const Group* group = nullptr;
    PackedActivations a{};
  } kept;
  if (kept.call == call && kept.group == group) return kept.a;
  kept.call = call;
  kept.group = group;
  kept.a =
      packed_activations(isa.panel, p.m(), p.k(), scratch_of<char>(Slot::panel, packed_bytes(isa.panel, p.m(), p.k())));
  for (int64_t i = 0; i < p.m(); ++i) pack_activations(isa, p, i, kept.a, i);
  return kept.a;
}

class Chunk {
 public:
  Chunk(const ExpertsIsa& isa, const ExpertsProblem& p, const Memory& memory, int64_t first, int64_t tokens)
      : isa_(isa), p_(p), memory_(memory), first_(first), tokens_(tokens) {
    sort();
    choose_x();
    for (int64_t e = 0; e < p_.num_experts; ++e)
      add_groups(p_.experts[e], memory_.begin[e], memory_.begin[e + 1] - memory_.begin[e], true);
    for (int64_t s = 0; s < p_.num_shared; ++s) add_groups(p_.shared[s], routed_ + s * tokens_, tokens_, false);
  }

  void run() {
    if (!groups_.empty()) {
      hidden_states();
      if (is_quantised(p_)) quantise(h_, memory_.hq, memory_.sh, &h_, &sh_);
      // h_ is known from here on to every group.
      for (Group& g : groups_) g.down = product(h_, sh_, nullptr, g.first, g.rows, g.expert->down);
    }
    p_.reduce ? results() : rows_of_slots();
  }

 private:
  int64_t k() const { return p_.top_k(); }
  int64_t cols_after(int64_t count) const { return h_.cols - count; }
  int64_t hidden() const { return p_.hidden(); }

  void sort() {
    int64_t* begin = memory_.begin;
    std::fill_n(begin, p_.num_experts + 1, 0);
    const auto each_slot = [&](const auto& body) {
      for (int64_t t = first_; t < first_ + tokens_; ++t)
        for (int64_t j = 0; j < k(); ++j)
          if (const int64_t e = index_at(p_.ids, t, j); e >= 0) body(e, t, t * k() + j);
    };
    each_slot([&](int64_t e, int64_t, int64_t) { ++begin[e + 1]; });
    for (int64_t e = 0; e < p_.num_experts; ++e) begin[e + 1] += begin[e];
    routed_ = begin[p_.num_experts];
    // begin[e] runs ahead while the slots are placed, and ends where e + 1 began.
    each_slot([&](int64_t e, int64_t t, int64_t s) {
      memory_.token_of[begin[e]] = static_cast<int32_t>(t);
      memory_.slot_of[begin[e]++] = static_cast<int32_t>(s);
    });
    for (int64_t e = p_.num_experts; e > 0; --e) begin[e] = begin[e - 1];
    begin[0] = 0;
    for (int64_t s = 0; s < p_.num_shared; ++s)
      for (int64_t t = 0; t < tokens_; ++t)
        memory_.token_of[routed_ + s * tokens_ + t] = static_cast<int32_t>(first_ + t);
    const int64_t slots = routed_ + p_.num_shared * tokens_;
    int64_t intermediate = p_.experts->gate.count;
    if (p_.num_shared) intermediate = std::max(intermediate, p_.shared->gate.count);
    h_ = dense(memory_.h, is_quantised(p_) ? Dtype::f32 : p_.x.dtype, slots, intermediate);
  }

  // x and its scales as the products take them: x itself, or the chunk's rows quantised, which token_of then counts.
  void choose_x() {
    x_ = p_.x;
    sx_ = p_.sx;
    if (!p_.quantize || p_.sx.values) return;
    Matrix rows = p_.x;
    rows.data = p_.x.at(first_, 0);
    rows.rows = tokens_;
    quantise(rows, memory_.xq, memory_.sx, &x_, &sx_);
    for (int64_t i = 0; i < routed_ + p_.num_shared * tokens_; ++i) memory_.token_of[i] -= static_cast<int32_t>(first_);
    x_first_ = first_;
  }

  void quantise(const Matrix& from, uint8_t* codes, float* scales, Matrix* data, ScaleGrid* grid) const {
    CastProblem cast;
    cast.x = from;
    cast.q = dense(codes, Dtype::e4m3fn, from.rows, from.cols);
    cast.scale = {dense(scales, Dtype::f32, from.rows, ceil_div(from.cols, kBlock)), 1, kBlock};
    cast.threads = p_.threads;
    cast_to_fp8(*isa_.packed->rows, cast);
    *data = cast.q;
    *grid = cast.scale;
  }

  GemmProblem product(const Matrix& a, const ScaleGrid& sa, const int32_t* index, int64_t first, int64_t rows,
                      const Projection& w) const {
    GemmProblem g;
    g.a = a;
    g.sa = sa;
    g.a_rows = index ? index + first : nullptr;
    g.a_count = rows;
    if (!index) {
      g.a.data = a.at(first, 0);
      g.a.rows = rows;
      g.a.cols = w.weight.cols;
      if (sa.values) {
        g.sa.values.data = sa.values.at(first, 0);
        g.sa.values.rows = rows;
        g.sa.values.cols = ceil_div(w.weight.cols, kBlock);
      }
    }
    g.b = w.weight;
    g.sb = w.scale;
    g.threads = p_.threads;
    return g;
  }

  void add_groups(const Expert& expert, int64_t first, int64_t rows, bool routed) {
    if (rows == 0) return;
    const GemmProblem gate = product(x_, sx_, memory_.token_of, first, rows, expert.gate);
    const GemmProblem up = product(x_, sx_, memory_.token_of, first, rows, expert.up);
    const GemmProblem down = product(h_, {}, nullptr, first, rows, expert.down);
    const GemmIsa* stream = isa_.stream;
    const bool streamed =
        stream && !stream_refuses(*stream, gate) && !stream_refuses(*stream, up) && !stream_refuses(*stream, down);
    any_streamed_ |= streamed;
    const int64_t widest = std::max(hidden(), expert.gate.count);
    const int64_t fitting =
        std::max<int64_t>(kPanelBytes / packed_bytes(isa_.packed->panel, 1, widest), isa_.packed->mr);
    const int64_t parts = streamed ? 1 : ceil_div(rows, std::min(fitting, kTaskRows));
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t from = first + rows * i / parts, count = first + rows * (i + 1) / parts - from;
      groups_.push_back({&expert, from, count, routed, streamed,
                         product(x_, sx_, memory_.token_of, from, count, expert.gate),
                         product(x_, sx_, memory_.token_of, from, count, expert.up), GemmProblem{}});
    }
  }

  StreamedActivations streamed_rows(const Matrix& a, const ScaleGrid& sa) const {
    GemmProblem all;
    all.a = a;
    all.sa = sa;
    all.b.dtype = p_.experts->gate.weight.dtype;
    all.threads = p_.threads;
    return streamed_activations(*isa_.stream, all);
  }

  // The part of `all` that begins at row `first`.
  static StreamedActivations from_row(const StreamedActivations& all, int64_t first) {
    return {all.values + first * all.k_padded, all.exponents + first, all.k_padded};
  }

  float weight(const Group& g, int64_t i) const {
    if (!g.routed || !p_.weights) return 1.f;
    const int64_t slot = memory_.slot_of[g.first + i];
    return *reinterpret_cast<const float*>(p_.weights.at(slot / k(), slot % k()));
  }

  // sums[i * ld + j] = row i of the group's product, column j0 + j of the projection; returns ld.
  int64_t block(const Group& g, const GemmProblem& p, const Projection& w, const StreamedActivations& streamed,
                uint64_t call, int64_t j0, int64_t cols, const char* next, float* sums) const {
    if (!g.streamed) {
      packed_block(*isa_.packed, p, packed_rows(*isa_.packed, p, call, &g), 0, g.rows, w.first + j0, cols, sums);
      return round_up(cols, isa_.packed->nr);
    }
    streamed_block(*isa_.stream, p, streamed, call, w.first + j0, cols, next, sums, cols);
    return cols;
  }

  static void add_bias(const RowOps& rows, const Projection& w, int64_t j0, int64_t n, float* sums) {
    if (!w.bias) return;
    float* bias = scratch_of<float>(Slot::row, n);
    if (w.bias.col_stride == 1) {
      rows.load(w.bias.dtype, w.bias.at(0, j0), n, bias);
    } else {
      for (int64_t j = 0; j < n; ++j) bias[j] = element(w.bias, 0, j0 + j);
    }
    for (int64_t j = 0; j < n; ++j) sums[j] += bias[j];
  }

  void hidden_states() {
    const RowOps& rows = *isa_.packed->rows;
    const uint64_t call = new_call();
    StreamedActivations x{};
    if (any_streamed_) {
      Matrix chunk = x_;
      ScaleGrid scales = sx_;
      const int64_t first = first_ - x_first_;
      chunk.data = x_.at(first, 0);
      chunk.rows = tokens_;
      if (scales.values) {
        scales.values.data = sx_.values.at(first, 0);
        scales.values.rows = tokens_;
      }
      x = from_row(streamed_rows(chunk, scales), -first);
    }
    Blocks blocks;
    for (const Group& g : groups_)
      blocks.add(g.expert->gate.count, g.streamed ? streamed_task_rows(*isa_.stream, g.gate) : kTaskCols);
    parallel_for(p_.threads, blocks.count(), [&](int64_t task) {
      const size_t at = blocks.group(task);
      const Group& g = groups_[at];
      const Projection &gate = g.expert->gate, &up = g.expert->up;
      const int64_t j0 = blocks.first_col(task, at), cols = std::min(blocks.width(at), gate.count - j0);
      const int64_t room = g.rows * round_up(cols, isa_.packed->nr);
      float* gates = scratch_of<float>(Slot::own_sums, 2 * room);
      float* ups = gates + room;
      const Group& after = groups_[j0 + cols < gate.count || at + 1 == groups_.size() ? at : at + 1];
      const int64_t next = &after == &g ? j0 + cols : 0;
      block(g, g.gate, gate, x, call, j0, cols, g.up.b.at(up.first + j0, 0), gates);
      const int64_t ld =
          block(g, g.up, up, x, call, j0, cols, after.gate.b.at(after.expert->gate.first + next, 0), ups);
      for (int64_t i = 0; i < g.rows; ++i) {
        float *a = gates + i * ld, *b = ups + i * ld;
        if (p_.weight_on_input) {
          rows.scale(a, weight(g, i), cols, a);
          rows.scale(b, weight(g, i), cols, b);
        }
        add_bias(rows, gate, j0, cols, a);
        add_bias(rows, up, j0, cols, b);
        rows.gated(p_.gating, a, b, cols, a);
        rows.store(h_.dtype, a, cols, h_.at(g.first + i, j0));
        if (j0 + cols == gate.count && cols_after(gate.count) > 0)  // of narrower experts than others
          std::memset(h_.at(g.first + i, gate.count), 0,
                      static_cast<size_t>(cols_after(gate.count) * size_of(h_.dtype)));
      }
    });
  }

  // columns(j0, cols, body) calls body(group, sums, ld) for every group, its products of these columns complete.
  template <class Body>
  void each_group(const StreamedActivations& h, uint64_t call, int64_t j0, int64_t cols, const Body& body) const {
    for (size_t at = 0; at < groups_.size(); ++at) {
      const Group& g = groups_[at];
      const bool last = at + 1 == groups_.size();
      const Group& after = groups_[last ? 0 : at + 1];
      const char* next = after.down.b.at(after.expert->down.first + j0 + (last ? cols : 0), 0);
      float* sums = scratch_of<float>(Slot::own_sums, g.rows * round_up(cols, isa_.packed->nr));
      const StreamedActivations own = g.streamed ? from_row(h, g.first) : h;
      const int64_t ld = block(g, g.down, g.expert->down, own, call, j0, cols, next, sums);
      for (int64_t i = 0; i < g.rows; ++i) add_bias(*isa_.packed->rows, g.expert->down, j0, cols, sums + i * ld);
      body(g, sums, ld);
    }
  }

  template <class Body>
  void each_columns(const Body& body) const {
    StreamedActivations h{};
    if (any_streamed_) h = streamed_rows(h_, sh_);
    const uint64_t call = new_call();
    parallel_for(p_.threads, ceil_div(hidden(), kResultCols), [&](int64_t task) {
      const int64_t j0 = task * kResultCols;
      body(h, call, j0, std::min(kResultCols, hidden() - j0));
    });
  }

  void results() const {
    each_columns([&](const StreamedActivations& h, uint64_t call, int64_t j0, int64_t cols) {
      float* totals = scratch_of<float>(Slot::own_totals, tokens_ * cols);
      std::fill_n(totals, tokens_ * cols, 0.f);
      each_group(h, call, j0, cols, [&](const Group& g, const float* sums, int64_t ld) {
        for (int64_t i = 0; i < g.rows; ++i) {
          const float w = p_.weight_on_input ? 1.f : weight(g, i);
          float* total = totals + (memory_.token_of[g.first + i] + x_first_ - first_) * cols;
          for (int64_t j = 0; j < cols; ++j) total[j] += w * sums[i * ld + j];
        }
      });
      for (int64_t t = 0; t < tokens_; ++t)
        store_row(*isa_.packed->rows, totals + t * cols, cols, p_.out, first_ + t, j0);
    });
  }

  // Without the sum: each slot's row, zeros where it is skipped.
  void rows_of_slots() const {
    each_columns([&](const StreamedActivations& h, uint64_t call, int64_t j0, int64_t cols) {
      const float zeros[kResultCols] = {};
      for (int64_t s = first_ * k(); s < (first_ + tokens_) * k(); ++s)
        if (index_at(p_.ids, s / k(), s % k()) < 0) store_row(*isa_.packed->rows, zeros, cols, p_.out, s, j0);
      each_group(h, call, j0, cols, [&](const Group& g, const float* sums, int64_t ld) {
        for (int64_t i = 0; i < g.rows; ++i)
          store_row(*isa_.packed->rows, sums + i * ld, cols, p_.out, memory_.slot_of[g.first + i], j0);
      });
    });
  }

  const ExpertsIsa& isa_;
  const ExpertsProblem& p_;
  const Memory& memory_;
  const int64_t first_, tokens_;
  int64_t routed_ = 0;
  int64_t x_first_ = 0;  // the token of x_'s first row
  Matrix x_, h_;
  ScaleGrid sx_, sh_;
  bool any_streamed_ = false;
  std::vector<Group> groups_;
};

}  // namespace

const char* experts_refuse(const ExpertsIsa& isa, const ExpertsProblem& p) {
  const auto refused = [&](const Projection& w) {
    GemmProblem g;
    g.a = dense(nullptr, is_quantised(p) ? Dtype::e4m3fn : p.x.dtype, 1, w.weight.cols);
    g.b = w.weight;
    g.sb = w.scale;
    return packed_refuses(*isa.packed, g);
  };
  for (const Expert* e : {p.experts, p.num_shared ? p.shared : p.experts})
    for (const Projection* w : {&e->gate, &e->up, &e->down})
      if (const char* reason = refused(*w)) return reason;
  return nullptr;
}

int64_t experts_workspace_bytes(const ExpertsProblem& p) {
  return p.tokens() ? Memory(p, nullptr).bytes + 63 : 0;  // wherever the workspace begins
}

void fused_experts(const ExpertsIsa& isa, const ExpertsProblem& p) {
  char* workspace = p.workspace.data;
  if (!workspace) workspace = scratch_of<char>(Slot::experts, experts_workspace_bytes(p));
  workspace += -reinterpret_cast<uintptr_t>(workspace) & 63;
  const Memory memory(p, workspace);
  for (int64_t first = 0; first < p.tokens(); first += memory.chunk)
    Chunk(isa, p, memory, first, std::min(memory.chunk, p.tokens() - first)).run();
}

}  // namespace moekern::cpu
