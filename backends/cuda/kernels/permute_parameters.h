// Of moe_permute and moe_unpermute.
#pragma once
#include "cuda/kernels/cast_parameters.h"

namespace moekern::cuda {

// ---- the row of every slot

constexpr int kBins = 1024;       // experts that are counted at a time
constexpr int kSortWarps = 32;    // of a thread block, at most
constexpr int kSortBlocks = 8;    // of the cluster, at most
constexpr int kSlotsATime = 128;  // that a warp has in flight: four a lane

struct SortParameters {
  Strided ids, expert_map, starts, counts, inverse;  // expert_map.data: null for none
  uint32_t slots, topk, experts, mapped, alignment;
  uint32_t bins;   // counters of a warp: the experts, or as many as are counted at a time
  uint32_t share;  // slots of a warp, which follow those of the warp before
};

// ---- rows to where their slots went

constexpr int kMoveThreads = 256;
constexpr int kMovePieces = 4;  // of a row that a thread has in flight

// Rows in pieces of 1 to 16 bytes, whatever their elements are.
struct Moved {
  Strided from, to;  // steps along a row are those of pieces
  uint32_t pieces, piece_bytes;
  uint32_t row_lanes;     // threads of a row: a power of two
  uint32_t column_tiles;  // of kMovePieces * row_lanes pieces
  uint32_t row_blocks;    // thread blocks that copy; behind them, those of each expert's padding
  uint32_t blocks;        // all of them
};

struct MoveParameters {
  Moved data, scales;  // no blocks: no scales
  Strided inverse, starts, counts;
  uint32_t tokens, topk, rows, alignment;
};

// ---- rows cast on their way there

struct PermuteCastParameters {
  CastParameters cast;  // of the tokens' rows; q and scale are those of all slots
  Strided inverse;
  uint32_t topk, rows;  // rows: of q
};

// ---- and back

constexpr int kUnpermuteThreads = 256;
constexpr int kSlotsInFlight = 8;

struct UnpermuteParameters {
  Strided y, inverse, weights, out;  // weights.data: null where all are 1
  uint32_t tokens, topk, rows, cols;
  uint32_t row_warps;     // of a row: a power of two
  uint32_t column_tiles;  // of row_warps * 32 pieces
};

}  // namespace moekern::cuda
