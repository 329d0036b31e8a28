// What routing kernels may take for granted. Of operands in the CPU's memory that includes their integers' values,
// which are read here, once a call.
#pragma once
#include <algorithm>
#include <cmath>
#include <utility>

#include "moekern/arguments.h"

namespace moekern {

// The expert here of a checked id, or -1.
inline int64_t local_expert(const PermuteProblem& p, int64_t token, int64_t slot) {
  const int64_t id = index_at(p.ids, token, slot);
  return id < 0 || !p.expert_map ? id : index_at(p.expert_map, 0, id);
}

inline void check_index_dtype(const char* op, const char* name, const Matrix& m) {
  check<TypeError>(is_index(m.dtype), op, ": ", name, " has dtype ", name_of(m.dtype), "; it is i32 or i64");
}

inline void check_shape(const char* op, const char* name, const Matrix& m, int64_t rows, int64_t cols,
                        const char* why) {
  check(m.rows == rows && m.cols == cols, op, ": ", name, " has shape ", shape_of(m), "; it must be [", rows, ", ",
        cols, "], ", why);
}

inline void check_gate(const char* op, const GateProblem& p) {
  const int64_t experts = p.logits.cols, size = experts / std::max(p.groups, 1);
  check<TypeError>(is_float(p.logits.dtype), op, ": logits has dtype ", name_of(p.logits.dtype),
                   "; it is f32, f16 or bf16");
  check(experts <= kMaxExperts, op, ": logits has ", experts, " columns; it must have at most ", kMaxExperts,
        ", one an expert");
  check(p.topk >= 1 && p.topk <= kMaxTopk && p.topk <= experts, op, ": topk is ", p.topk, "; it must be in 1 .. ",
        std::min<int64_t>(kMaxTopk, experts), ", with ", experts, " experts");
  check(p.groups >= 1 && experts % p.groups == 0, op, ": num_expert_group is ", p.groups, "; it must divide ", experts,
        ", the number of experts");
  check(p.kept_groups >= 1 && p.kept_groups <= p.groups, op, ": topk_group is ", p.kept_groups, "; it must be in 1 .. ",
        p.groups, ", the number of groups");
  check(std::isfinite(p.routed_scaling_factor), op, ": routed_scaling_factor is ", p.routed_scaling_factor,
        "; it must be finite");
  check(p.mask_value == 0 || p.mask_value == -INFINITY, op, ": mask_value is ", p.mask_value, "; it is -inf or 0");
  check(p.mask_value == 0 || p.topk <= p.kept_groups * size, op, ": topk is ", p.topk, "; the ", p.kept_groups,
        " groups that are kept have ", p.kept_groups * size, " experts");
  if (!p.correction_bias) return;
  check<TypeError>(is_float(p.correction_bias.dtype), op, ": correction_bias has dtype ",
                   name_of(p.correction_bias.dtype), "; it is f32, f16 or bf16");
  check(p.correction_bias.cols == experts, op, ": correction_bias has ", p.correction_bias.cols,
        " elements; there are ", experts, " experts");
  check(p.kept_groups == p.groups || size >= 2, op, ": num_expert_group is ", p.groups,
        ", which leaves one expert a group; with a correction_bias a group counts by its two best");
}

inline void check_gate_output(const char* op, const GateProblem& p) {
  check_shape(op, "out.weights", p.weights, p.logits.rows, p.topk, "tokens by topk");
  check_shape(op, "out.ids", p.ids, p.logits.rows, p.topk, "tokens by topk");
  check<TypeError>(p.weights.dtype == Dtype::f32, op, ": out.weights has dtype ", name_of(p.weights.dtype),
                   "; it must be f32");
  check<TypeError>(p.ids.dtype == Dtype::i32, op, ": out.ids has dtype ", name_of(p.ids.dtype), "; it must be i32");
  for (const auto& [name, out] : {std::pair{"out.weights", p.weights}, std::pair{"out.ids", p.ids}}) {
    check_output(op, name, out);
    check_apart(op, name, out, "logits", p.logits);
    check_apart(op, name, out, "correction_bias", p.correction_bias);
  }
  check_apart(op, "out.weights", p.weights, "out.ids", p.ids);
}

// All but the outputs and the values of ids and expert_map.
inline void check_permute(const char* op, const PermuteProblem& p) {
  check<TypeError>(is_float(p.x.dtype) || (is_fp8(p.x.dtype) && p.sx.values), op, ": x has dtype ", name_of(p.x.dtype),
                   is_fp8(p.x.dtype) ? " but no scale" : "", "; it is f32, f16 or bf16, or FP8 with a scale");
  check<TypeError>(!is_float(p.x.dtype) || !p.sx.values, op, ": x has dtype ", name_of(p.x.dtype),
                   " and a scale; only FP8 data is scaled");
  if (p.sx.values) {
    check_grid(op, "x", p.x, p.sx);
    check(p.sx.block_rows == 1, op, ": x.block is (", p.sx.block_rows, ", ", p.sx.block_cols,
          "); it must be (1, columns): a scale that tokens share cannot move with one of them");
  }
  check_index_dtype(op, "ids", p.ids);
  check(p.ids.rows == p.x.rows, op, ": ids has ", p.ids.rows, " rows; x has ", p.x.rows, " tokens");
  if (p.expert_map) check_index_dtype(op, "expert_map", p.expert_map);
}

inline void check_permute_ids(const char* op, const PermuteProblem& p, int64_t experts) {
  if (p.expert_map) check_ids(op, "expert_map", p.expert_map, experts);
  check_ids(op, "ids", p.ids, p.expert_map ? p.expert_map.cols : experts);
}

// counts[g], and starts[g]: the sum of the counts before it, each rounded up to the alignment. Returns the last end.
inline int64_t count_experts(const PermuteProblem& p, const Matrix& of_starts, const Matrix& of_counts) {
  auto *starts = reinterpret_cast<int64_t*>(of_starts.data), *counts = reinterpret_cast<int64_t*>(of_counts.data);
  const int64_t experts = of_counts.cols;
  std::fill_n(counts, experts, 0);
  for (int64_t t = 0; t < p.ids.rows; ++t)
    for (int64_t j = 0; j < p.ids.cols; ++j)
      if (const int64_t g = local_expert(p, t, j); g >= 0) ++counts[g];
  int64_t end = 0;
  for (int64_t g = 0; g < experts; ++g) {
    starts[g] = end;
    end += blocks(counts[g], p.alignment) * p.alignment;
  }
  return end;
}

// `used`: the rows that the groups take. format: what x is cast to, or Dtype::other.
inline void check_permute_output(const char* op, const PermuteProblem& p, int64_t used, Dtype format) {
  const bool cast = format != Dtype::other, scaled = cast || p.sx.values;
  const char* rows = cast ? "the cast" : "x";  // what out.x has to look like
  const Dtype dtype = cast ? format : p.x.dtype, scale_dtype = cast ? Dtype::f32 : p.sx.values.dtype;
  const int64_t block_cols = cast ? p.kCastColumns : p.sx.block_cols;
  check<TypeError>(p.out.dtype == dtype, op, ": out.x has dtype ", name_of(p.out.dtype), "; ", rows, " has ",
                   name_of(dtype));
  check(p.out.cols == p.x.cols, op, ": out.x has ", p.out.cols, " columns; x has ", p.x.cols);
  check(p.out.rows >= used, op, ": out.x has ", p.out.rows, " rows; these ids take ", used);
  check(p.out.rows <= INT32_MAX, op, ": out.x has ", p.out.rows, " rows; the inverse map counts to 2^31 - 1");
  check(p.out.cols <= 1 || p.out.col_stride == 1, op,
        ": out.x must be contiguous along its last dimension, its strides are (", p.out.row_stride, ", ",
        p.out.col_stride, ")");
  check_shape(op, "out.inverse", p.inverse, p.ids.rows, p.ids.cols, "like ids");
  check<TypeError>(p.inverse.dtype == Dtype::i32, op, ": out.inverse has dtype ", name_of(p.inverse.dtype),
                   "; it must be i32");
  check<TypeError>(!p.sout.values == !scaled, op, ": out.x ", p.sout.values ? "has a scale" : "has no scale", "; ",
                   rows, scaled ? " has one" : " has none");
  if (scaled) {
    check(p.sout.block_rows == 1 && p.sout.block_cols == block_cols, op, ": out.x.block is (", p.sout.block_rows, ", ",
          p.sout.block_cols, "); ", rows, " has blocks of (1, ", block_cols, ")");
    check_grid(op, "out.x", p.out, p.sout);
    check<TypeError>(p.sout.values.dtype == scale_dtype, op, ": out.x.scale has dtype ", name_of(p.sout.values.dtype),
                     "; ", rows, " has scales of ", name_of(scale_dtype));
  }
  const std::pair<const char*, Matrix> outputs[] = {
      {"out.x", p.out}, {"out.x.scale", p.sout.values}, {"out.inverse", p.inverse}};
  const std::pair<const char*, Matrix> inputs[] = {
      {"x", p.x}, {"x.scale", p.sx.values}, {"ids", p.ids}, {"expert_map", p.expert_map}};
  for (const auto& [name, out] : outputs) {
    check_output(op, name, out);
    for (const auto& [other, in] : inputs) check_apart(op, name, out, other, in);
    for (const auto& [other, in] : outputs)
      if (other != name) check_apart(op, name, out, other, in);
  }
}

inline void check_unpermute(const char* op, const UnpermuteProblem& p) {
  check<TypeError>(is_float(p.y.dtype), op, ": y has dtype ", name_of(p.y.dtype), "; it is f32, f16 or bf16");
  check_index_dtype(op, "inverse", p.inverse);
  if (p.weights) {
    check<TypeError>(is_float(p.weights.dtype), op, ": weights has dtype ", name_of(p.weights.dtype),
                     "; it is f32, f16 or bf16");
    check_shape(op, "weights", p.weights, p.inverse.rows, p.inverse.cols, "like inverse");
  }
}

inline void check_unpermute_output(const char* op, const UnpermuteProblem& p) {
  check_shape(op, "out", p.out, p.inverse.rows, p.y.cols, "tokens by columns of y");
  check<TypeError>(is_float(p.out.dtype), op, ": out has dtype ", name_of(p.out.dtype), "; it is f32, f16 or bf16");
  check(p.out.cols <= 1 || p.out.col_stride == 1, op,
        ": out must be contiguous along its last dimension, its strides are (", p.out.row_stride, ", ",
        p.out.col_stride, ")");
  check_output(op, "out", p.out);
  check_apart(op, "out", p.out, "y", p.y);
  check_apart(op, "out", p.out, "inverse", p.inverse);
  check_apart(op, "out", p.out, "weights", p.weights);
}

}  // namespace moekern
