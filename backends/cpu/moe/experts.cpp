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

#include "cpu/gemm/products.h"
#include "cpu/parallel.h"
#include "cpu/quant/driver.h"

namespace moekern::cpu {
namespace {

constexpr int64_t kChunkBytes = 64 << 20;  // of a chunk's hidden states, and of its normalised x
constexpr int64_t kChunkTokens = 2048;     // whose sums for 128 columns are the 1 MiB of an L2

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
    chunk = std::min({p.tokens(), kChunkTokens, std::max<int64_t>(kChunkBytes / token_bytes, 1)});
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

class Chunk {
 public:
  Chunk(const GemmPair& isa, const ExpertsProblem& p, const Memory& memory, int64_t first, int64_t tokens)
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
    GemmProblem down = product(h_, {}, nullptr, first, rows, expert.down);
    if (is_quantised(p_)) down.a.dtype = Dtype::e4m3fn;  // by the time it is multiplied
    const bool streamed = streams(isa_, gate) && streams(isa_, up) && streams(isa_, down);
    if (streamed) streamed_rows_ += rows;
    any_packed_ |= !streamed;
    const int64_t widest = std::max(hidden(), expert.gate.count);
    const int64_t parts = streamed ? 1 : ceil_div(rows, packed_part_rows(*isa_.packed, widest));
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t from = first + rows * i / parts, count = first + rows * (i + 1) / parts - from;
      groups_.push_back({&expert, from, count, routed, streamed,
                         product(x_, sx_, memory_.token_of, from, count, expert.gate),
                         product(x_, sx_, memory_.token_of, from, count, expert.up), GemmProblem{}});
    }
  }

  float weight(const Group& g, int64_t i) const {
    if (!g.routed || !p_.weights) return 1.f;
    const int64_t slot = memory_.slot_of[g.first + i];
    return *reinterpret_cast<const float*>(p_.weights.at(slot / k(), slot % k()));
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
    const StreamedActivations x = streamed_x();
    int64_t rows_of_weights = 0;
    for (const Group& g : groups_) rows_of_weights += g.expert->gate.count;
    const int64_t width = streamed_task_rows(rows_of_weights, p_.threads);
    Blocks blocks;
    for (const Group& g : groups_) blocks.add(g.expert->gate.count, g.streamed ? width : kTaskCols);
    parallel_for(p_.threads, blocks.count(), [&](int64_t task) {
      const Blocks::Block block = blocks[task];
      const Group& g = groups_[block.part];
      const Projection &gate = g.expert->gate, &up = g.expert->up;
      const int64_t j0 = block.first, cols = std::min(block.width, gate.count - j0);
      float* gates = scratch_of<float>(Slot::own_sums, 2 * sums_room(isa_, g.rows, cols));
      float* ups = gates + sums_room(isa_, g.rows, cols);
      StreamedActivations own = x;
      own.index = memory_.token_of + g.first;
      const Part of_gate{&g.gate, 0, g.rows, g.streamed, own}, of_up{&g.up, 0, g.rows, g.streamed, own};
      const PackedActivations packed = pack_part(isa_, of_gate);
      multiply_part(isa_, of_gate, packed, gate.first + j0, cols, g.up.b.at(up.first + j0, 0), gates);
      const bool last_of_group = j0 + cols == gate.count && block.part + 1 < groups_.size();
      const Group& after = groups_[block.part + (last_of_group ? 1 : 0)];
      const char* next = after.gate.b.at(after.expert->gate.first + (last_of_group ? 0 : j0 + cols), 0);
      const int64_t ld = multiply_part(isa_, of_up, packed, up.first + j0, cols, next, ups);
      for (int64_t i = 0; i < g.rows; ++i) {
        float *a = gates + i * ld, *b = ups + i * ld;
        if (p_.weight_on_input) {
          rows.scale(a, weight(g, i), cols, a);
          rows.scale(b, weight(g, i), cols, b);
        }
        add_bias(rows, gate, j0, cols, a);
        add_bias(rows, up, j0, cols, b);
        rows.gated(p_.gating, Dtype::f32, reinterpret_cast<const char*>(a), reinterpret_cast<const char*>(b), cols, a,
                   0);
        rows.store(h_.dtype, a, cols, h_.at(g.first + i, j0));
        if (j0 + cols == gate.count)  // of an expert that is narrower than others
          std::memset(h_.at(g.first + i, gate.count), 0,
                      static_cast<size_t>((h_.cols - gate.count) * size_of(h_.dtype)));
      }
    });
  }

  // The chunk's rows of x for the experts that are streamed; row i is that of token x_first_ + i.
  StreamedActivations streamed_x() const {
    if (!streamed_rows_) return {};
    const int64_t first = first_ - x_first_, bytes = streamed_bytes(*isa_.stream, tokens_, hidden());
    StreamedActivations x =
        streamed_activations(*isa_.stream, tokens_, hidden(), scratch_of<char>(Slot::shared_a, bytes));
    GemmProblem all;
    all.a = x_;
    all.sa = sx_;
    parallel_for(p_.threads, tokens_, [&](int64_t i) { stream_activations(*isa_.stream, all, first + i, x, i); });
    x.values -= first * x.k_padded * size_of(isa_.stream->stream->panel);
    x.exponents -= first;
    if (x.row_scales) x.row_scales -= first * (x.k_padded / kBlock);
    return x;
  }

  // The rows of h for the experts that are streamed, a part for every group.
  std::vector<Part> parts_of_h() const {
    std::vector<Part> parts;
    char* memory = nullptr;
    if (streamed_rows_) {
      const auto most = static_cast<int64_t>(groups_.size());
      memory = scratch_of<char>(Slot::shared_a, streamed_bytes(*isa_.stream, streamed_rows_, h_.cols) + 64 * most);
    }
    for (const Group& g : groups_) {
      parts.push_back({&g.down, 0, g.rows, g.streamed, {}});
      if (!g.streamed) continue;
      parts.back().activations = streamed_activations(*isa_.stream, g.rows, g.down.k(), memory);
      memory += round_up(streamed_bytes(*isa_.stream, g.rows, g.down.k()), 64);
    }
    if (streamed_rows_)
      parallel_for(p_.threads, static_cast<int64_t>(parts.size()), [&](int64_t at) {
        const Part& part = parts[static_cast<size_t>(at)];
        for (int64_t i = 0; part.streamed && i < part.rows; ++i)
          stream_activations(*isa_.stream, *part.product, i, part.activations, i);
      });
    return parts;
  }

  // body(j0, cols, each_group) for every block of the result's columns, in parallel. each_group(add) calls
  // add(group, sums, ld) for every group, with its rows' products of these columns, biases added.
  template <class Body>
  void each_columns(const Body& body) const {
    const std::vector<Part> parts = parts_of_h();
    // Narrow blocks balance the threads better, but every block packs its rows anew.
    const int64_t width = any_packed_ ? kTaskCols : streamed_task_rows(hidden(), p_.threads);
    parallel_for(p_.threads, ceil_div(hidden(), width), [&](int64_t task) {
      const int64_t j0 = task * width, cols = std::min(width, hidden() - j0);
      body(j0, cols, [&](const auto& add) {
        for (size_t at = 0; at < groups_.size(); ++at) {
          const Group& g = groups_[at];
          const bool last = at + 1 == groups_.size();
          const Group& after = groups_[last ? 0 : at + 1];
          const char* next = after.down.b.at(after.expert->down.first + j0 + (last ? cols : 0), 0);
          float* sums = scratch_of<float>(Slot::own_sums, sums_room(isa_, g.rows, cols));
          const int64_t ld =
              multiply_part(isa_, parts[at], pack_part(isa_, parts[at]), g.expert->down.first + j0, cols, next, sums);
          for (int64_t i = 0; i < g.rows; ++i) add_bias(*isa_.packed->rows, g.expert->down, j0, cols, sums + i * ld);
          add(g, sums, ld);
        }
      });
    });
  }

  void results() const {
    each_columns([&](int64_t j0, int64_t cols, const auto& each_group) {
      float* totals = scratch_of<float>(Slot::own_totals, tokens_ * cols);
      std::fill_n(totals, tokens_ * cols, 0.f);
      each_group([&](const Group& g, const float* sums, int64_t ld) {
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
    each_columns([&](int64_t j0, int64_t cols, const auto& each_group) {
      const float zeros[kTaskCols] = {};
      for (int64_t s = first_ * k(); s < (first_ + tokens_) * k(); ++s)
        if (index_at(p_.ids, s / k(), s % k()) < 0) store_row(*isa_.packed->rows, zeros, cols, p_.out, s, j0);
      each_group([&](const Group& g, const float* sums, int64_t ld) {
        for (int64_t i = 0; i < g.rows; ++i)
          store_row(*isa_.packed->rows, sums + i * ld, cols, p_.out, memory_.slot_of[g.first + i], j0);
      });
    });
  }

  const GemmPair& isa_;
  const ExpertsProblem& p_;
  const Memory& memory_;
  const int64_t first_, tokens_;
  int64_t routed_ = 0;
  int64_t x_first_ = 0;  // the token of x_'s first row
  Matrix x_, h_;
  ScaleGrid sx_, sh_;
  int64_t streamed_rows_ = 0;
  bool any_packed_ = false;
  std::vector<Group> groups_;
};

}  // namespace

const char* experts_refuse(const GemmPair& isa, const ExpertsProblem& p) {
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

void fused_experts(const GemmPair& isa, const ExpertsProblem& p) {
  char* workspace = p.workspace.data;
  if (!workspace) workspace = scratch_of<char>(Slot::experts, experts_workspace_bytes(p));
  workspace += -reinterpret_cast<uintptr_t>(workspace) & 63;
  const Memory memory(p, workspace);
  for (int64_t first = 0; first < p.tokens(); first += memory.chunk)
    Chunk(isa, p, memory, first, std::min(memory.chunk, p.tokens() - first)).run();
}

}  // namespace moekern::cpu
