// Two launches: kernels/permute_sort.cu says where every slot's row goes, kernels/permute.cu moves the rows,
// and begins before the first has ended. Where rows are cast, kernels/permute_cast.cu takes the second's place, and a
// third launch is left with the padding.
#include "cuda/moe/permute.h"

#include <algorithm>

#include "cuda/kernels/permute_parameters.h"
#include "cuda/launch.h"
#include "cuda/quant/cast.h"
#include "cuda/rows.h"
#include "cuda/strided.h"

namespace moekern::cuda {
namespace {

// Rows fit 31 bits, so a larger alignment leaves no room for any.
uint32_t alignment_of(const PermuteProblem& p) {
  return static_cast<uint32_t>(std::min<int64_t>(p.alignment, int64_t{1} << 31));
}

void sort(const PermuteProblem& p) {
  const int64_t slots = p.ids.rows * p.ids.cols, experts = p.starts.cols;
  constexpr int64_t kOfBlock = kSortWarps * kSlotsATime;
  const uint32_t blocks = power_of_two(ceil_div(slots, kOfBlock), kSortBlocks);
  const uint32_t warps = power_of_two(ceil_div(slots, int64_t{32}), kSortWarps);
  const int64_t share = ceil_div(ceil_div<int64_t>(slots, blocks * warps), int64_t{32}) * 32;
  const auto bins = static_cast<uint32_t>(std::clamp<int64_t>(experts, 1, kBins));
  const SortParameters parameters{strided(p.ids),
                                  strided(p.expert_map),
                                  strided(p.starts),
                                  strided(p.counts),
                                  strided(p.inverse),
                                  static_cast<uint32_t>(slots),
                                  static_cast<uint32_t>(p.ids.cols),
                                  static_cast<uint32_t>(experts),
                                  static_cast<uint32_t>(p.expert_map.cols),
                                  alignment_of(p),
                                  bins,
                                  static_cast<uint32_t>(share)};
  launch({"permute_sort",
          {blocks, 1, 1},
          warps * 32,
          blocks,
          static_cast<unsigned>(warps * bins * sizeof(uint32_t)),
          &parameters},
         p.stream);
}

// The widest pieces that rows of both divide into.
uint32_t piece_bytes(const Matrix& from, const Matrix& to) {
  const auto fits = [](const Matrix& m, int64_t bytes) {
    return has_rows_at(m, bytes) && m.cols * size_of(m.dtype) % bytes == 0;
  };
  int64_t bytes = has_contiguous_rows(from) && has_contiguous_rows(to) ? kPieceBytes : size_of(to.dtype);
  while (bytes > size_of(to.dtype) && !(fits(from, bytes) && fits(to, bytes))) bytes /= 2;
  return static_cast<uint32_t>(bytes);
}

Moved moved(const PermuteProblem& p, const Matrix& from, const Matrix& to, int64_t tokens) {
  Moved m{};
  m.from = strided(from);
  m.to = strided(to);
  m.piece_bytes = piece_bytes(from, to);
  if (has_contiguous_rows(from)) m.from.col_step = m.piece_bytes;
  if (has_contiguous_rows(to)) m.to.col_step = m.piece_bytes;
  const int64_t pieces = to.cols * size_of(to.dtype) / m.piece_bytes;
  m.pieces = static_cast<uint32_t>(pieces);
  m.row_lanes = power_of_two(ceil_div<int64_t>(pieces, kMovePieces), kMoveThreads);
  m.column_tiles = static_cast<uint32_t>(ceil_div<int64_t>(pieces, kMovePieces * m.row_lanes));
  const int64_t rows = ceil_div<int64_t>(tokens, kMoveThreads / m.row_lanes);
  const int64_t padded = p.alignment == 1 ? 0 : p.starts.cols;
  m.row_blocks = static_cast<uint32_t>(rows * m.column_tiles);
  m.blocks = static_cast<uint32_t>((rows + padded) * m.column_tiles);
  return m;
}

// The tokens' rows, whose places are those of all slots.
CastProblem cast_of(const PermuteProblem& p) {
  CastProblem c;
  c.x = p.x;
  c.q = p.out;
  c.scale = p.sout;
  c.round_scale_up = p.round_scale_up;
  return c;
}

void cast(const PermuteProblem& p) {
  constexpr CastKernels kKernels = {"permute_cast_f32", "permute_cast_f16", "permute_cast_bf16",
                                    "permute_cast_elements"};
  const CastProblem c = cast_of(p);
  const PermuteCastParameters parameters{parameters_of(c), strided(p.inverse), static_cast<uint32_t>(p.ids.cols),
                                         static_cast<uint32_t>(p.out.rows)};
  launch({kernel_for(c, kKernels), {row_blocks(c), 1, 1}, kCastThreads, 1, 0, &parameters, true}, p.stream);
}

// Rows, and the padding behind them; where rows are cast, the padding alone.
void move(const PermuteProblem& p) {
  const int64_t tokens = p.casts() ? 0 : p.ids.rows;
  MoveParameters parameters{};
  parameters.data = moved(p, p.casts() ? p.out : p.x, p.out, tokens);
  if (p.sout.values) parameters.scales = moved(p, p.casts() ? p.sout.values : p.sx.values, p.sout.values, tokens);
  parameters.inverse = strided(p.inverse);
  parameters.starts = strided(p.starts);
  parameters.counts = strided(p.counts);
  parameters.tokens = static_cast<uint32_t>(tokens);
  parameters.topk = static_cast<uint32_t>(p.ids.cols);
  parameters.rows = static_cast<uint32_t>(p.out.rows);
  parameters.alignment = alignment_of(p);
  launch({"permute_rows",
          {parameters.data.blocks + parameters.scales.blocks, 1, 1},
          kMoveThreads,
          1,
          0,
          &parameters,
          true},
         p.stream);
}

}  // namespace

const char* permute_refuses(const PermuteProblem& p) {
  if (p.ids.rows * std::max<int64_t>(p.ids.cols, 1) > INT32_MAX) return "takes fewer than 2^31 slots";
  // A thread block has about 16 KB of a row, and there are at most 2^31 of them.
  if ((p.ids.rows + p.starts.cols) * ceil_div<int64_t>(p.x.cols, kMovePieces * kMoveThreads) > INT32_MAX / 2)
    return "takes fewer or shorter rows";
  return p.casts() ? cast_refuses(cast_of(p)) : nullptr;
}

void permute(const PermuteProblem& p) {
  sort(p);
  if (p.casts()) cast(p);
  move(p);
}

}  // namespace moekern::cuda
