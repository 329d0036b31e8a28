// fused_experts on the packed GEMM, expert by expert.
//
//   for each chunk of tokens                  so that the chunk's products, a row for every slot, fit in memory
//     slots sorted by expert, within an expert in their own order
//     for each expert, for each block of its slots
//       x gathered, quantised on demand
//       gate, up = W x;  h = activation       rounded to x's dtype, or quantised
//       the slot's row = W h + bias
//     out = the sum over each token's slots, then over the shared experts
#include "cpu/moe/experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/gemm/driver.h"
#include "cpu/gemm/operands.h"
#include "cpu/parallel.h"
#include "cpu/quant/driver.h"

namespace moekern::cpu {
namespace {

constexpr int64_t kSlotBytes = 256 << 20;  // of a chunk's products
constexpr int64_t kBlockRows = 1024;       // activations that a GEMM takes at once: four rows of its tasks

struct Member {   // of an expert
  int64_t token;  // row of x
  int64_t slot;   // token * k + j
};

bool quantised(const ExpertsProblem& p) { return p.quantize || is_fp8(p.x.dtype); }

// The GEMM starts at a block of scales: so many rows before the projection's own.
int64_t lead(const Projection& w) { return w.first % w.scale.block_rows; }
int64_t width(const Projection& w) { return lead(w) + w.count; }

int64_t largest(const ExpertsProblem& p, int64_t (*of)(const Expert&)) {
  const int64_t shared = p.num_shared ? of(p.shared[0]) : 0;
  return std::max(of(p.experts[0]), shared);
}

// All memory of a call, in one piece. Experts of one list have equal shapes.
struct Buffers {
  int64_t chunk, block;  // tokens, rows
  Member* members;       // [chunk * k]
  int64_t* begin;        // [num_experts + 1], of each expert's members
  float* slots;          // [chunk * max(k, 1)][hidden], without reduce none
  char* x;               // [block][hidden], in x's dtype
  uint8_t* xq;           // [block][hidden]
  float* sx;             // [block][hidden / 128]
  float *gate, *up;      // [block][width]
  char* h;               // [block][intermediate], in x's dtype or as FP8
  float* sh;             // [block][intermediate / 128]
  float* y;              // [block][hidden]
  int64_t bytes = 0;

  Buffers(const ExpertsProblem& p, char* memory) {
    const int64_t k = std::max<int64_t>(p.top_k(), 1), hidden = p.hidden();
    const int64_t intermediate = largest(p, [](const Expert& e) { return e.gate.count; });
    const int64_t fitting = std::max<int64_t>(kSlotBytes / (k * hidden * static_cast<int64_t>(sizeof(float))), 1);
    chunk = p.reduce ? std::min(p.tokens(), fitting) : p.tokens();
    block = std::min(chunk * k, kBlockRows);
    take(members, memory, chunk * k);
    take(begin, memory, p.num_experts + 1);
    take(slots, memory, p.reduce ? chunk * k * hidden : 0);
    take(x, memory, block * hidden * size_of(p.x.dtype));
    take(xq, memory, p.quantize ? block * hidden : 0);
    take(sx, memory, quantised(p) ? block * ceil_div(hidden, kBlock) : 0);
    take(gate, memory, block * largest(p, [](const Expert& e) { return width(e.gate); }));
    take(up, memory, block * largest(p, [](const Expert& e) { return width(e.up); }));
    take(h, memory, block * intermediate * (quantised(p) ? 1 : size_of(p.x.dtype)));
    take(sh, memory, quantised(p) ? block * ceil_div(intermediate, kBlock) : 0);
    take(y, memory, block * largest(p, [](const Expert& e) { return width(e.down); }));
  }

 private:
  template <class T>
  void take(T*& pointer, char* memory, int64_t count) {
    pointer = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes));
    bytes += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
  }
};

Matrix dense(void* data, Dtype dtype, int64_t rows, int64_t cols, int64_t row_stride) {
  return {static_cast<char*>(data), dtype, rows, cols, row_stride, 1};
}

struct Activations {
  Matrix data;
  ScaleGrid scale;
};

class Run {
 public:
  Run(const GemmIsa& isa, const ExpertsProblem& p, char* memory) : isa_(isa), p_(p), b_(p, memory) {}

  void chunk(int64_t first, int64_t tokens) {
    sort(first, tokens);
    for (int64_t e = 0; e < p_.num_experts; ++e) {
      each_block(b_.begin[e], b_.begin[e + 1], [&](const Member* m, int64_t n) {
        feed_forward(p_.experts[e], m, n, p_.weight_on_input);
        parallel_for(p_.threads, n, [&](int64_t i) {
          const float* row = product(p_.experts[e].down, i);
          if (p_.reduce) {
            std::memcpy(slot(m[i].slot - first * k()), row, static_cast<size_t>(p_.hidden()) * sizeof(float));
          } else {
            store(m[i].slot, row);
          }
        });
      });
    }
    if (!p_.reduce) return;
    parallel_for(p_.threads, tokens, [&](int64_t i) { reduce(first, i); });
    for (int64_t i = 0; i < tokens; ++i) b_.members[i] = {first + i, i};
    for (int64_t s = 0; s < p_.num_shared; ++s) {
      each_block(0, tokens, [&](const Member* m, int64_t n) {
        feed_forward(p_.shared[s], m, n, false);
        parallel_for(p_.threads, n, [&](int64_t i) {
          const float* row = product(p_.shared[s].down, i);
          float* sum = total(m[i].slot);
          for (int64_t q = 0; q < p_.hidden(); ++q) sum[q] += row[q];
        });
      });
    }
    parallel_for(p_.threads, tokens, [&](int64_t i) { store(first + i, total(i)); });
  }

  // Rows of skipped slots, which no expert writes.
  void clear() {
    parallel_for(p_.threads, p_.ids.rows * k(), [&](int64_t i) {
      if (index_at(p_.ids, i / k(), i % k()) >= 0) return;
      float* zeros = scratch_of<float>(Slot::own_c, p_.hidden());
      std::fill_n(zeros, p_.hidden(), 0.f);
      store(i, zeros);
    });
  }

 private:
  int64_t k() const { return p_.top_k(); }
  float* slot(int64_t at) const { return b_.slots + at * p_.hidden(); }
  float* total(int64_t token) const { return slot(token * std::max<int64_t>(k(), 1)); }  // the first slot's row
  float* product(const Projection& w, int64_t i) const { return b_.y + i * width(w) + lead(w); }
  float weight(int64_t slot) const { return p_.weights ? element(p_.weights, slot / k(), slot % k()) : 1.f; }

  template <class Body>
  void each_block(int64_t begin, int64_t end, const Body& body) const {
    for (int64_t i = begin; i < end; i += b_.block) body(b_.members + i, std::min(b_.block, end - i));
  }

  void sort(int64_t first, int64_t tokens) const {
    std::fill_n(b_.begin, p_.num_experts + 1, 0);
    const auto each_slot = [&](const auto& body) {
      for (int64_t t = first; t < first + tokens; ++t)
        for (int64_t j = 0; j < k(); ++j)
          if (const int64_t e = index_at(p_.ids, t, j); e >= 0) body(e, t, t * k() + j);
    };
    each_slot([&](int64_t e, int64_t, int64_t) { ++b_.begin[e + 1]; });
    for (int64_t e = 0; e < p_.num_experts; ++e) b_.begin[e + 1] += b_.begin[e];
    // begin[e] runs ahead while the members are placed, and ends where e + 1 began.
    each_slot([&](int64_t e, int64_t t, int64_t s) { b_.members[b_.begin[e]++] = {t, s}; });
    for (int64_t e = p_.num_experts; e > 0; --e) b_.begin[e] = b_.begin[e - 1];
    b_.begin[0] = 0;
  }

  Activations gather(const Member* members, int64_t n) const {
    const int64_t hidden = p_.hidden(), blocks = ceil_div(hidden, kBlock);
    const Matrix x = dense(b_.x, p_.x.dtype, n, hidden, hidden);
    const ScaleGrid scale{dense(b_.sx, Dtype::f32, n, blocks, blocks), 1, kBlock};
    parallel_for(p_.threads, n, [&](int64_t i) {
      const int64_t t = members[i].token, size = size_of(x.dtype);
      if (p_.x.col_stride == 1) {
        std::memcpy(x.at(i, 0), p_.x.at(t, 0), static_cast<size_t>(hidden * size));
      } else {
        for (int64_t q = 0; q < hidden; ++q) std::memcpy(x.at(i, q), p_.x.at(t, q), static_cast<size_t>(size));
      }
      if (!p_.sx.values) return;
      for (int64_t q = 0; q < blocks; ++q) b_.sx[i * blocks + q] = scale_of(p_.sx, t, q * kBlock);
    });
    if (p_.sx.values) return {x, scale};
    return p_.quantize ? quantise(x, b_.xq, scale) : Activations{x, {}};
  }

  Activations quantise(const Matrix& x, void* codes, const ScaleGrid& scale) const {
    CastProblem cast;
    cast.x = x;
    cast.q = dense(codes, Dtype::e4m3fn, x.rows, x.cols, x.cols);
    cast.scale = scale;
    cast.threads = p_.threads;
    cast_to_fp8(*isa_.rows, cast);
    return {cast.q, scale};
  }

  // out[i][lead .. ] = a[i] times the projection's rows, in f32.
  void project(const Activations& a, const Projection& w, float* out) const {
    const int64_t start = w.first - lead(w), blocks = start / w.scale.block_rows;
    GemmProblem g;
    g.a = a.data;
    g.sa = a.scale;
    g.b = w.weight;
    g.b.data = w.weight.at(start, 0);
    g.b.rows = width(w);
    g.sb = w.scale;
    g.sb.values.data = w.scale.values.at(blocks, 0);
    g.sb.values.rows -= blocks;
    g.out = dense(out, Dtype::f32, a.data.rows, width(w), width(w));
    g.threads = p_.threads;
    gemm_packed(isa_, g);
  }

  void feed_forward(const Expert& e, const Member* members, int64_t n, bool weighted) const {
    const Activations x = gather(members, n);
    project(x, e.gate, b_.gate);
    project(x, e.up, b_.up);
    const int64_t count = e.gate.count;
    const bool rounded = !quantised(p_);
    const Matrix h = dense(b_.h, rounded ? p_.x.dtype : Dtype::e4m3fn, n, count, count);
    parallel_for(p_.threads, n, [&](int64_t i) {
      float* gate = b_.gate + i * width(e.gate) + lead(e.gate);
      const float* up = b_.up + i * width(e.up) + lead(e.up);
      const float w = weighted ? weight(members[i].slot) : 1.f;
      for (int64_t q = 0; q < count; ++q)
        gate[q] = activation(biased(w * gate[q], e.gate, q), biased(w * up[q], e.up, q));
      if (rounded) isa_.rows->store(h.dtype, gate, count, h.at(i, 0));
    });
    Activations a{h, {}};
    if (!rounded) {
      const Matrix exact = dense(b_.gate + lead(e.gate), Dtype::f32, n, count, width(e.gate));
      const int64_t blocks = ceil_div(count, kBlock);
      a = quantise(exact, b_.h, {dense(b_.sh, Dtype::f32, n, blocks, blocks), 1, kBlock});
    }
    project(a, e.down, b_.y);
    if (!e.down.bias) return;
    parallel_for(p_.threads, n, [&](int64_t i) {
      float* row = product(e.down, i);
      for (int64_t q = 0; q < p_.hidden(); ++q) row[q] = biased(row[q], e.down, q);
    });
  }

  static float biased(float x, const Projection& w, int64_t i) { return w.bias ? x + element(w.bias, 0, i) : x; }

  float activation(float g, float u) const {
    g = g > p_.limit ? p_.limit : g;  // NaN stays
    u = u > p_.limit ? p_.limit : u < -p_.limit ? -p_.limit : u;
    if (p_.activation == Activation::swiglu) return g / (1.f + std::exp(-p_.alpha * g)) * (u + p_.beta);
    if (p_.activation == Activation::gelu) return 0.5f * g * std::erfc(-0.707106781f * g) * u;
    // (1 + tanh z) / 2 = 1 / (1 + e^-2z)
    return g / (1.f + std::exp(-1.595769122f * (g + 0.044715f * g * g * g))) * u;
  }

  void reduce(int64_t first, int64_t token) const {
    float* sum = total(token);
    for (int64_t j = 0; j < std::max<int64_t>(k(), 1); ++j) {
      const bool used = j < k() && index_at(p_.ids, first + token, j) >= 0;
      const float w = used && !p_.weight_on_input ? weight((first + token) * k() + j) : 1.f;
      const float* row = slot(token * std::max<int64_t>(k(), 1) + j);
      for (int64_t q = 0; q < p_.hidden(); ++q) sum[q] = (j ? sum[q] : 0.f) + (used ? w * row[q] : 0.f);
    }
  }

  void store(int64_t row, const float* values) const {
    const Matrix& out = p_.out;
    if (out.col_stride == 1) return isa_.rows->store(out.dtype, values, out.cols, out.at(row, 0));
    for (int64_t q = 0; q < out.cols; ++q) isa_.rows->store(out.dtype, values + q, 1, out.at(row, q));
  }

  const GemmIsa& isa_;
  const ExpertsProblem& p_;
  const Buffers b_;
};

}  // namespace

const char* experts_refuse(const GemmIsa& isa, const ExpertsProblem& p) {
  const auto refused = [&](const Projection& w) {
    GemmProblem g;
    g.a = dense(nullptr, quantised(p) ? Dtype::e4m3fn : p.x.dtype, 1, w.weight.cols, w.weight.cols);
    g.b = w.weight;
    g.sb = w.scale;
    return packed_refuses(isa, g);
  };
  for (const Expert* e : {p.experts, p.num_shared ? p.shared : p.experts})
    for (const Projection* w : {&e->gate, &e->up, &e->down})
      if (const char* reason = refused(*w)) return reason;
  return nullptr;
}

int64_t experts_workspace_bytes(const ExpertsProblem& p) {
  return p.tokens() ? Buffers(p, nullptr).bytes + 63 : 0;  // wherever the workspace begins
}

void fused_experts(const GemmIsa& isa, const ExpertsProblem& p) {
  char* memory = p.workspace.data;
  if (!memory) memory = scratch_of<char>(Slot::experts, experts_workspace_bytes(p));
  memory += -reinterpret_cast<uintptr_t>(memory) & 63;
  Run run(isa, p, memory);
  const int64_t chunk = Buffers(p, memory).chunk;
  for (int64_t first = 0; first < p.tokens(); first += chunk) run.chunk(first, std::min(chunk, p.tokens() - first));
  if (!p.reduce) run.clear();
}

}  // namespace moekern::cpu
