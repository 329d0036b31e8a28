// What a native backend exports: rows of data. Selection happens in python/moekern/op.py, which is
// the only dispatcher; csrc/bindings/ turns each row into a Python callable.
#pragma once
#include <cstdint>
#include <string>

#include "moekern/gating.h"
#include "moekern/tensor_view.h"

namespace moekern {

// Where kernels of an accelerator are queued: the stream that is current there when the op is called.
struct Stream {
  int device = 0;
  void* handle = nullptr;
};

// What a call has besides its operands.
struct Problem {
  int threads = 1;  // of the CPU
  Stream stream;    // of an accelerator
};

// out = cast(c + bias + (a . sa) (b . sb)^T), accumulated in f32 or better.
struct GemmProblem : Problem {
  Matrix a;                         // [m, k] FP8 with sa, or f32/f16/bf16 without
  const int32_t* a_rows = nullptr;  // with it, row i of the product is that of row a_rows[i] of a, for i < a_count
  int64_t a_count = 0;
  ScaleGrid sa;
  Matrix b;  // [n, k] FP8
  ScaleGrid sb;
  Matrix c;     // [m, n] or empty
  Matrix bias;  // [1, n] or empty
  Matrix out;   // [m, n]

  int64_t m() const { return a_rows ? a_count : a.rows; }
  int64_t a_row(int64_t i) const { return a_rows ? a_rows[i] : i; }
  int64_t n() const { return b.rows; }
  int64_t k() const { return a.cols; }
};

// Where the operands of one group's product begin, and the extents that are its own.
struct Group {
  char *a, *sa, *b, *sb, *c, *out;  // null as in GemmProblem
  int64_t m, k;
};

// The layout of groups, whose extents only their device knows. Group g has counts[g] rows (of a and out, or, with
// k-grouped operands, of a and b) from starts[g] on; in a masked layout, the first counts[g] of the `capacity` rows of
// matrix g. Values may be anything: kernels keep to their operands.
struct GroupsThere {
  const int64_t *starts = nullptr, *counts = nullptr;  // [count]
  int64_t count = 0, rows = 0, capacity = -1;          // negative: contiguous
  Stack a, sa, b, sb, c, out;     // as the spec has them; of one matrix where groups have rows of it
  bool separate_weights = false;  // b is no stack, but a tensor for every group, of which b and sb are the first
};

// Products that have n, dtypes, strides and scale blocks in common, each by weights of its own. Their outputs
// share no element.
struct GroupedGemmProblem : Problem {
  GemmProblem shared;             // what they have in common; the largest k, no addresses
  const Group* groups = nullptr;  // null where the host may not look
  int64_t count = 0;
  GroupsThere there;

  GemmProblem operator[](int64_t i) const {
    const Group& g = groups[i];
    GemmProblem p = shared;
    p.a.data = g.a;
    p.b.data = g.b;
    p.c.data = g.c;
    p.out.data = g.out;
    p.sa.values.data = g.sa;
    p.sb.values.data = g.sb;
    p.a.rows = p.c.rows = p.out.rows = g.m;
    p.a.cols = p.b.cols = g.k;
    p.sa.values.rows = (g.m + p.sa.block_rows - 1) / p.sa.block_rows;
    p.sa.values.cols = (g.k + p.sa.block_cols - 1) / p.sa.block_cols;
    p.sb.values.cols = (g.k + p.sb.block_cols - 1) / p.sb.block_cols;
    p.threads = threads;
    return p;
  }
};

// One (x, q . scale) pair of equal shape: a cast reads x and writes q and scale, `dequantize` the reverse.
struct CastProblem : Problem {
  Matrix x;         // f32, f16 or bf16; [m, 2n] = [gate | up] for silu_mul
  Matrix q;         // [m, n] FP8
  ScaleGrid scale;  // f32 values; powers of two when round_scale_up
  bool round_scale_up = false;
};

// The experts of each token: weights and ids of the topk largest selection values, which python/moekern/ops/gate.py
// defines. At most kMaxExperts and kMaxTopk, so that a row of scores fits the first-level cache.
constexpr int kMaxExperts = 1024, kMaxTopk = 32;
struct GateProblem : Problem {
  Matrix logits;           // [tokens, experts] f32, f16 or bf16
  Matrix correction_bias;  // [1, experts] or empty
  Matrix weights;          // [tokens, topk] f32
  Matrix ids;              // [tokens, topk] i32
  int topk = 1, groups = 1, kept_groups = 1;
  bool sigmoid = false;  // else softmax
  bool renormalize = false;
  float routed_scaling_factor = 1, mask_value = 0;
};

// Rows of x in the order of their experts, as they are or cast to FP8. Expert g has the rows starts[g] .. starts[g] +
// counts[g] of out, and zeros up to the next multiple of the alignment; inverse[t, j] is the row of slot j of token t,
// or -1.
struct PermuteProblem : Problem {
  Matrix x;  // [tokens, hidden] f32, f16 or bf16, or FP8 with sx, which has one row a token
  ScaleGrid sx;
  Matrix ids;             // [tokens, topk] i32 or i64
  Matrix expert_map;      // [1, ids' experts] i32, or empty
  Matrix starts, counts;  // [1, experts] i64
  int64_t alignment = 1;
  Matrix out;      // [rows, hidden]
  ScaleGrid sout;  // of FP8 rows
  Matrix inverse;  // [tokens, topk] i32

  static constexpr int64_t kCastColumns = 128;  // that share a scale
  bool round_scale_up = false;
  bool casts() const { return sout.values && !sx.values; }
};

// out[t] = cast(sum_j weights[t, j] y[inverse[t, j]]), slots of -1 left out.
struct UnpermuteProblem : Problem {
  Matrix y;        // [rows, hidden] f32, f16 or bf16
  Matrix inverse;  // [tokens, topk] i32 or i64
  Matrix weights;  // [tokens, topk] f32, f16 or bf16; or empty: all are 1
  Matrix out;      // [tokens, hidden] f32, f16 or bf16
};

// The rows [first, first + count) of a weight matrix: a projection's outputs. Scales are looked up by the
// row of `weight`, which a block may share with another projection.
struct Projection {
  Matrix weight;  // [rows, inputs] FP8
  ScaleGrid scale;
  Matrix bias;  // [1, count], or empty
  int64_t first = 0, count = 0;
};

// Gate and up may be halves of one matrix, or every other row of one: views with twice its row stride.
struct Expert {
  Projection gate, up, down;
};

// out[t] = sum_j weights[t, j] y(experts[ids[t, j]], x[t]) + sum_s y(shared[s], x[t]), where of an expert
// h = gating(gate x, up x) and y = down h, biases included. h is rounded to x's dtype, or quantised; a token's sum
// is f32, in the order of the experts.
struct ExpertsProblem : Problem {
  Matrix x;      // [t, inputs] f32, f16 or bf16, or FP8 with sx
  ScaleGrid sx;  // 1x128
  const Expert* experts = nullptr;
  int64_t num_experts = 0;
  const Expert* shared = nullptr;  // applied to every token
  int64_t num_shared = 0;
  Matrix ids;      // [t, k] i32 or i64: an expert, or -1 for none
  Matrix weights;  // [t, k] f32, or empty: all 1
  Gating gating;
  bool quantize = false;         // x, unless it is FP8 already, and h, 1x128 to e4m3fn
  bool weight_on_input = false;  // weights[t, j] x[t] instead of weights[t, j] y: exact, the products are scaled
  bool reduce = true;
  Matrix out;         // [t, inputs], or [t k, inputs] of y without weights when not `reduce`
  Matrix workspace;   // u8 [1, bytes], or empty: the kernel's own memory
  Matrix expert_map;  // [1, ids' experts] i32 or i64, or empty: applied already

  int64_t tokens() const { return x.rows; }
  int64_t top_k() const { return ids.cols; }
  int64_t hidden() const { return x.cols; }
};

// One op of a kernel. `refuses` gives a static reason in plain words, or nullptr; where it is null, nothing is refused.
template <class P>
struct Routine {
  void (*run)(const P&) = nullptr;  // null: the kernel has no such op
  const char* (*refuses)(const P&) = nullptr;
};

struct GemmKernel {
  const char* name;
  uint64_t needs;
  Routine<GemmProblem> gemm;
};

struct GroupedGemmKernel {  // there is at least one group
  const char* name;
  uint64_t needs;
  Routine<GroupedGemmProblem> m_grouped, k_grouped;
};

struct CastKernel {
  const char* name;
  uint64_t needs;
  Routine<CastProblem> cast, silu_mul_cast, dequantize;
};

struct RoutingKernel {
  const char* name;
  uint64_t needs;
  Routine<GateProblem> gate;
  Routine<PermuteProblem> permute;
  Routine<UnpermuteProblem> unpermute;
};

struct ExpertsKernel {
  const char* name;
  uint64_t needs;
  Routine<ExpertsProblem> experts;
  int64_t (*workspace_bytes)(const ExpertsProblem&);  // for any values of operands of these shapes
  bool needs_workspace = false;                       // has no memory of its own: whoever calls allocates it
};

// One stream, one with software prefetch, two streams: which is fastest depends on the machine, and on
// how busy its memory is.
constexpr int kReadLoops = 3;
constexpr int64_t kLimitGranule = 1024;  // bytes read or copied are a multiple: unrolled loops, no tail

// The device's own limits as one ISA reaches them: what bench/ holds that ISA's kernels against.
struct LimitLoops {
  const char* name;
  uint64_t needs;
  int64_t (*multiply_add)(int threads);  // f32, in registers; returns the floating-point operations done
  void (*read)(int loop, const char* src, int64_t bytes, int threads);
  void (*copy)(const char* src, int64_t bytes, char* dst, int threads);
};

template <class Row>
struct Table {
  const Row* rows;
  int size;
  const Row* begin() const { return rows; }
  const Row* end() const { return rows + size; }
};

struct Feature {  // one bit of a kernel's `needs`, by the name that Device.features uses
  uint64_t bit;
  const char* name;
};

// Compiled code for a device, inside this library.
struct Module {
  const char* name;
  const unsigned char *image, *end;
  Table<const char*> kernels;
};

// Of backends whose kernels a driver loads, which is found at run time.
struct DriverKernels {
  Table<const Module*> modules;
  void (*use_driver)(const char* library);  // from now on; null: the vendor's
  std::string (*why_no_driver)();           // empty: it can run them
};

// Every native backend defines `const Backend& moekern::<name>::backend()`.
struct Backend {
  Table<GemmKernel> gemm;
  Table<GroupedGemmKernel> grouped_gemm;
  Table<CastKernel> cast;
  Table<RoutingKernel> routing;
  Table<ExpertsKernel> experts;
  Table<LimitLoops> limits;
  Table<Feature> features;
  uint64_t (*detect_features)();
  const char* (*thread_team)();           // whose threads run the kernels, for people; null on devices
  const DriverKernels* driver = nullptr;  // null on CPUs
};

}  // namespace moekern
