// What casts have in common: a thread's pieces of rows, the magnitudes in them, their codes.
//
// An input says how many elements V a piece has, how one is loaded (Loaded), what is kept of it until the scale is
// known (Held), and what is kept of several to find the largest magnitude of each place (Tops).
#pragma once
#include "cuda/kernels/cast_parameters.h"
#include "cuda/kernels/elements.cuh"
#include "cuda/kernels/to_fp8.cuh"

namespace moekern::cuda {

// 16 bytes of a row, as they are.
template <Dtype F>
struct Whole {
  static constexpr int V = kPerPiece<F>;
  using Loaded = Piece;
  using Held = Piece;
  using Tops = Piece;
  static constexpr bool kWholePieces = true;

  __device__ static Loaded load(const CastParameters& p, uint32_t row, uint32_t col, int64_t step = 0) {
    if (row < p.rows && col < p.cols) return load_piece(at(p.x, row, 0) + col * (kPieceBytes / V) + step);
    return {};
  }
  __device__ static Held hold(const Loaded& x) { return x; }
  __device__ static float value(const Held& x, int i) { return element<F>(x, i); }

  // Magnitudes order like integers.
  __device__ static void see(Tops& tops, const Held& x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) see_word(tops.words[i], x.words[i]);
  }
  __device__ static uint32_t top(const Tops& tops, int i) { return __float_as_uint(element<F>(tops, i)); }
  // The largest of them all.
  __device__ static uint32_t amax(Tops tops) {
#pragma unroll
    for (int i = 1; i < 4; ++i) see_word(tops.words[0], tops.words[i]);
    return F == Dtype::f32 ? tops.words[0] : max(top(tops, 0), top(tops, 1));
  }

 private:
  __device__ static void see_word(uint32_t& top, uint32_t word) {
    top = F == Dtype::f32 ? max(top, word & 0x7fffffffu) : __vmaxu2(top, word & 0x7fff7fffu);
  }
};

template <int N>
struct Floats {
  static constexpr int V = N;
  struct Held {
    float values[N];
  };
  using Tops = Held;
  __device__ static float value(const Held& x, int i) { return x.values[i]; }
  __device__ static void see(Tops& tops, const Held& x) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const uint32_t size = __float_as_uint(x.values[i]) & 0x7fffffffu;
      tops.values[i] = __uint_as_float(max(__float_as_uint(tops.values[i]), size));
    }
  }
  __device__ static uint32_t top(const Tops& tops, int i) { return __float_as_uint(tops.values[i]); }
  __device__ static uint32_t amax(const Tops& tops) {
    uint32_t best = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) best = max(best, top(tops, i));
    return best;
  }
};

// Any strides, any dtype, any number of columns: element by element.
struct Elements : Floats<4> {
  static constexpr bool kWholePieces = false;
  using Loaded = Held;
  __device__ static Loaded load(const CastParameters& p, uint32_t row, uint32_t col, int64_t step = 0) {
    Loaded x{};
    if (row < p.rows)
#pragma unroll
      for (int i = 0; i < V; ++i)
        if (col + i < p.cols) x.values[i] = load_float(at(p.x, row, col + i) + step, p.x.dtype);
    return x;
  }
  __device__ static Held hold(const Loaded& x) { return x; }
};

// The codes of a piece, four a word.
template <class Input>
struct Codes {
  uint32_t words[Input::V / 4];
};

template <class Input, Dtype F, class Inverse>
__device__ inline Codes<Input> codes_of(const typename Input::Held& x, const Inverse& inverse) {
  Codes<Input> codes;
#pragma unroll
  for (int i = 0; i < Input::V / 4; ++i) {
    float y[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) y[j] = __fmul_rn(Input::value(x, 4 * i + j), inverse(4 * i + j));
    codes.words[i] = to_fp8x2<F>(y[0], y[1]) | to_fp8x2<F>(y[2], y[3]) << 16;
  }
  return codes;
}

// To a row of q, at once where its rows allow it.
template <class Input>
__device__ inline void store_codes(const CastParameters& p, uint32_t row, uint32_t col, const Codes<Input>& codes) {
  if (col >= p.cols) return;
  if constexpr (Input::kWholePieces) {
    char* q = at(p.q, row, 0) + col;
    if constexpr (Input::V == 8)
      *reinterpret_cast<uint2*>(q) = {codes.words[0], codes.words[1]};
    else
      *reinterpret_cast<uint32_t*>(q) = codes.words[0];
  } else {
#pragma unroll
    for (int i = 0; i < Input::V; ++i)
      if (col + i < p.cols) *at(p.q, row, col + i) = static_cast<char>(codes.words[i / 4] >> (i % 4 * 8));
  }
}

}  // namespace moekern::cuda
