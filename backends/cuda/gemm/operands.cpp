#include "cuda/gemm/operands.h"

#include <algorithm>

#include "moekern/arguments.h"

namespace moekern::cuda {
namespace {

// Blocks of at least `extent` are one.
bool in_steps(int64_t block, int64_t extent) { return block >= extent || block % kStep == 0; }

Swizzle swizzle_of(int bytes) {
  return bytes == 128 ? Swizzle::bytes_128 : bytes == 64 ? Swizzle::bytes_64 : Swizzle::bytes_32;
}

}  // namespace

const char* operand_refused(const Stack& x) {
  if (x.matrix.dtype != Dtype::e4m3fn) return "takes operands of e4m3fn";
  if (x.matrix.rows > INT32_MAX || x.matrix.cols > INT32_MAX - kStep || x.count > INT32_MAX)
    return "takes fewer than 2^31 rows and columns";
  if (x.matrix.cols > 0 && x.matrix.rows > 0 && x.count > 0 && !has_tensor_map(x))
    return "takes operands whose rows are contiguous and begin at multiples of 16 bytes";
  return nullptr;
}

const char* scales_refused(const ScaleGrid& s, int64_t k) {
  return in_steps(s.block_cols, k) ? nullptr : "takes scales of multiples of 128 columns";
}

const char* weight_scales_refused(const ScaleGrid& s, int64_t n, int64_t k) {
  if (const char* reason = scales_refused(s, k)) return reason;
  return in_steps(s.block_rows, n) ? nullptr : "takes scales of multiples of 128 rows of b";
}

Rows rows_of(const Stack& x) {
  return {reinterpret_cast<const uint8_t*>(x.matrix.data), x.matrix.row_stride, 1, x.stride};
}

Scales scales_of(const ScaleGrid& s, int64_t group_stride) {
  Scales of;
  of.values = s.values.data;
  of.row_stride = s.values.row_stride;
  of.step_stride = s.values.col_stride;
  of.group_stride = group_stride;
  of.block_rows = static_cast<int32_t>(std::min<int64_t>(s.block_rows, INT32_MAX));
  of.steps = static_cast<int32_t>(std::min<int64_t>(blocks(s.block_cols, kStep), INT32_MAX));
  of.ue8m0 = s.values.dtype == Dtype::ue8m0;
  return of;
}

Addend addend_of(const Stack& x) {
  return {x.matrix.data, x.matrix.row_stride, x.matrix.col_stride, x.stride, x.matrix.dtype};
}

Result result_of(const Stack& x) {
  return {x.matrix.data, x.matrix.row_stride, x.matrix.col_stride, x.stride, x.matrix.dtype, false};
}

Boxed operand_boxes(const Stack& x, int rows) {
  return boxed(x, static_cast<uint32_t>(rows), kStep, Swizzle::bytes_128);
}

Boxed result_boxes(const Stack& out, int columns) {
  const int bytes = size_of(out.matrix.dtype), piece = piece_columns(columns, bytes);
  return boxed(out, 16, static_cast<uint32_t>(piece), swizzle_of(piece * bytes));
}

}  // namespace moekern::cuda
