// Prints, as JSON, where CuTe's headers say that elements lie: which lane and register holds which element of a matrix
// instruction, at which byte of shared memory it lies in each swizzle, and the descriptors of such tiles. generate.py
// compiles and runs it. Nothing is computed here that the headers compute.
//
// A table over pairs (thread, value) or (row, column) is printed as two lists, one for each side, whose entries are
// combined by + or ^; whether that gives the whole table is checked here for every pair.

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

// Addresses are those that tensors are given below: there is no shared memory to convert from.
static inline std::size_t __cvta_generic_to_shared(void const* address) {
  return reinterpret_cast<std::size_t>(address);
}

#include <cute/arch/mma_sm89.hpp>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/atom/copy_traits_sm90_tma_swizzle.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm89.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

using namespace cute;
using SM90::GMMA::Major;

constexpr int base_address = 1024;  // of all tiles; the alignment of the largest swizzle

[[noreturn]] static void fail(char const* what) {
  std::fprintf(stderr, "cute_layouts: %s\n", what);
  std::exit(1);
}

static std::string list(int count, std::function<std::string(int)> const& entry) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) text += (i ? ", " : "") + entry(i);
  return text + "]";
}

// entry(i, j) as a list of entry(i, 0) and one of entry(0, j), where entry(0, 0) is 0.
static std::string table(char const* outer, int outer_count, char const* inner, int inner_count, bool exclusive,
                         std::function<int(int, int)> const& entry) {
  for (int i = 0; i < outer_count; ++i)
    for (int j = 0; j < inner_count; ++j) {
      int const a = entry(i, 0), b = entry(0, j);
      if (entry(i, j) != (exclusive ? a ^ b : a + b)) fail("a table is not made of its first row and column");
    }
  return std::string("{\"") + outer + "\": " + list(outer_count, [&](int i) { return std::to_string(entry(i, 0)); }) +
         ", \"" + inner + "\": " + list(inner_count, [&](int j) { return std::to_string(entry(0, j)); }) + "}";
}

// Where (thread, value) lies in a matrix: row + column * rows.
template <class Layout>
static std::string fragment(Layout layout) {
  return table("threads", size<0>(layout), "values", size<1>(layout), false,
               [&](int thread, int value) { return int(layout(thread, value)); });
}

// ---- fragments of wgmma

template <class Traits>
static std::string accumulator() {
  return fragment(typename Traits::CLayout{});
}

static std::string accumulators() {
  std::string text = "{";
#define MOEKERN_ACCUMULATOR(N)                                                                            \
  {                                                                                                       \
    auto const eight = accumulator<MMA_Traits<SM90::GMMA::MMA_64x##N##x32_F32E4M3E4M3_SS_TN<>>>();        \
    using Sixteen = SM90::GMMA::MMA_64x##N##x16_F32BF16BF16_SS<Major::K, Major::K>;                       \
    if (accumulator<MMA_Traits<Sixteen>>() != eight) fail("accumulators depend on the type of operands"); \
    text += std::string(text.size() > 1 ? ",\n" : "\n") + "    \"" #N "\": " + eight;                     \
  }
  MOEKERN_ACCUMULATOR(8)
  MOEKERN_ACCUMULATOR(16)
  MOEKERN_ACCUMULATOR(24)
  MOEKERN_ACCUMULATOR(32)
  MOEKERN_ACCUMULATOR(40)
  MOEKERN_ACCUMULATOR(48)
  MOEKERN_ACCUMULATOR(56)
  MOEKERN_ACCUMULATOR(64)
  MOEKERN_ACCUMULATOR(72)
  MOEKERN_ACCUMULATOR(80)
  MOEKERN_ACCUMULATOR(88)
  MOEKERN_ACCUMULATOR(96)
  MOEKERN_ACCUMULATOR(104)
  MOEKERN_ACCUMULATOR(112)
  MOEKERN_ACCUMULATOR(120)
  MOEKERN_ACCUMULATOR(128)
  MOEKERN_ACCUMULATOR(136)
  MOEKERN_ACCUMULATOR(144)
  MOEKERN_ACCUMULATOR(152)
  MOEKERN_ACCUMULATOR(160)
  MOEKERN_ACCUMULATOR(168)
  MOEKERN_ACCUMULATOR(176)
  MOEKERN_ACCUMULATOR(184)
  MOEKERN_ACCUMULATOR(192)
  MOEKERN_ACCUMULATOR(200)
  MOEKERN_ACCUMULATOR(208)
  MOEKERN_ACCUMULATOR(216)
  MOEKERN_ACCUMULATOR(224)
  MOEKERN_ACCUMULATOR(232)
  MOEKERN_ACCUMULATOR(240)
  MOEKERN_ACCUMULATOR(248)
  MOEKERN_ACCUMULATOR(256)
#undef MOEKERN_ACCUMULATOR
  return text + "\n  }";
}

// ---- tiles in shared memory

struct None {};  // no instruction takes such operands

// A tile of one operand in units of a swizzle: at which byte each element lies, how TMA is told of the swizzle, and the
// descriptors for an instruction. B has all its rows in one instruction, A has 64, and as many instructions.
template <Major major, class Type, class Instruction, class Atom, class Shape>
static std::string tile(char const* name, Atom atom, Shape shape) {
  auto const layout = tile_to_shape(atom, shape);
  auto const tensor = make_tensor(make_smem_ptr(reinterpret_cast<Type*>(base_address)), layout);
  auto const mode = TMA::to_CUtensorMapSwizzle(detail::get_tma_swizzle_bits(atom), detail::get_tma_swizzle_base(atom));
  int const bits = sizeof_bits<Type>::value, rows = size<0>(layout), columns = size<1>(layout);
  std::string text = std::string("    {\"major\": \"") + (major == Major::K ? "k" : "mn") + "\", \"swizzle\": \"" +
                     name + "\", \"mode\": " + std::to_string(int(mode)) + ", \"bits\": " + std::to_string(bits) +
                     ",\n     \"atom\": [" + std::to_string(size<0>(atom)) + ", " + std::to_string(size<1>(atom)) +
                     "],\n     \"bytes\": ";
  text += table("rows", rows, "columns", columns, true, [&](int row, int column) {
    return int(reinterpret_cast<std::intptr_t>(&tensor(row, column)) - base_address);
  });
  if constexpr (!std::is_same_v<Instruction, None>) {
    auto const multiply = make_tiled_mma(Instruction{}).get_slice(0);
    auto const a = multiply.make_fragment_A(multiply.partition_A(tensor));
    auto const b = multiply.make_fragment_B(multiply.partition_B(tensor));
    if (size<1>(b) != 1 || size<2>(a) != size<2>(b)) fail("unexpected parts of a tile");
    text += ",\n     \"a\": " + list(size<1>(a), [&](int m) {
              return list(size<2>(a), [&](int k) { return std::to_string(uint64_t(a(0, m, k))); });
            });
    text += ",\n     \"b\": " + list(size<2>(b), [&](int k) { return std::to_string(uint64_t(b(0, 0, k))); });
  }
  return text + "}";
}

template <Major major, class Type, class Instruction, class Shape>
static std::string tiles(Shape shape) {
  using namespace SM90::GMMA;
  return tile<major, Type, Instruction>("none", Layout_INTER_Atom<Type, major>{}, shape) + ",\n" +
         tile<major, Type, Instruction>("32", Layout_SW32_Atom<Type, major>{}, shape) + ",\n" +
         tile<major, Type, Instruction>("64", Layout_SW64_Atom<Type, major>{}, shape) + ",\n" +
         tile<major, Type, Instruction>("128", Layout_SW128_Atom<Type, major>{}, shape);
}

// ---- ldmatrix, stmatrix

// Where a lane's 16-bit elements lie in the rows that lanes give addresses of, in the order of those lanes.
template <class Fragment, class Rows>
static std::string matrix(Fragment fragment_bits, Rows row_bits, int matrices) {
  for (int lane = 0; lane < 8 * matrices; ++lane)
    if (row_bits(lane, 0) != 128 * lane) fail("rows of a matrix are not in the order of lanes");
  return table("threads", 32, "values", 2 * matrices, false,
               [&](int lane, int value) { return int(fragment_bits(lane, 16 * value)) / 16; });
}

template <class Load, class Store>
static std::string matrices(char const* name, int count) {
  using L = Copy_Traits<Load>;
  using S = Copy_Traits<Store>;
  return std::string("    \"") + name +
         "\": {\"load\": " + matrix(typename L::DstLayout{}, typename L::SrcLayout{}, count) +
         ",\n      \"store\": " + matrix(typename S::SrcLayout{}, typename S::DstLayout{}, count) + "}";
}

// ---- mma.sync

template <class Instruction>
static std::string mma(char const* name) {
  using T = MMA_Traits<Instruction>;
  return std::string("    \"") + name + "\": {\"a\": " + fragment(typename T::ALayout{}) +
         ",\n      \"b\": " + fragment(typename T::BLayout{}) + ",\n      \"c\": " + fragment(typename T::CLayout{}) +
         "}";
}

// ---- the bits of a descriptor

static std::string field(char const* name, void (*set)(GmmaDescriptor&)) {
  GmmaDescriptor descriptor(0);
  set(descriptor);
  int shift = 0, width = 0;
  while (!(descriptor.desc_ >> shift & 1)) ++shift;
  while (shift + width < 64 && descriptor.desc_ >> (shift + width) & 1) ++width;
  return std::string("\"") + name + "\": [" + std::to_string(shift) + ", " + std::to_string(width) + "]";
}

int main() {
  using namespace SM90::GMMA;
  using E4M3 = float_e4m3_t;
  using BF16 = bfloat16_t;
  using EightBits = MMA_64x256x32_F32E4M3E4M3_SS_TN<>;
  using AlongK = MMA_64x256x16_F32BF16BF16_SS<Major::K, Major::K>;
  using AcrossK = MMA_64x256x16_F32BF16BF16_SS<Major::MN, Major::MN>;

  std::string text = "{\n  \"base_address\": " + std::to_string(base_address) + ",\n  \"descriptor\": {";
  text += field("address", [](GmmaDescriptor& d) { d.bitfield.start_address_ = 0x3fff; }) + ", ";
  text += field("leading_byte_offset", [](GmmaDescriptor& d) { d.bitfield.leading_byte_offset_ = 0x3fff; }) + ", ";
  text += field("stride_byte_offset", [](GmmaDescriptor& d) { d.bitfield.stride_byte_offset_ = 0x3fff; }) + ", ";
  text += field("base_offset", [](GmmaDescriptor& d) { d.bitfield.base_offset_ = 7; }) + ", ";
  text += field("layout", [](GmmaDescriptor& d) { d.bitfield.layout_type_ = 3; }) + "},\n";
  text += "  \"wgmma_accumulator\": " + accumulators();
  text += ",\n  \"wgmma_a\": {\n    \"8\": " + fragment(MMA_Traits<MMA_64x64x32_F32E4M3E4M3_RS_TN<>>::ALayout{}) +
          ",\n    \"16\": " + fragment(MMA_Traits<MMA_64x64x16_F32BF16BF16_RS<Major::K, Major::K>>::ALayout{}) +
          "\n  }";
  text += ",\n  \"tiles\": [\n" + tiles<Major::K, E4M3, EightBits>(Shape<_256, _128>{});
  text += ",\n" + tiles<Major::K, BF16, AlongK>(Shape<_256, _64>{});
  text += ",\n" + tiles<Major::MN, BF16, AcrossK>(Shape<_256, _64>{});
  text += ",\n" + tiles<Major::MN, E4M3, None>(Shape<_256, _128>{}) + "\n  ]";
  text += ",\n  \"matrix\": {\n" + matrices<SM75_U32x1_LDSM_N, SM90_U32x1_STSM_N>("x1", 1) + ",\n" +
          matrices<SM75_U32x2_LDSM_N, SM90_U32x2_STSM_N>("x2", 2) + ",\n" +
          matrices<SM75_U32x4_LDSM_N, SM90_U32x4_STSM_N>("x4", 4) + ",\n" +
          matrices<SM75_U16x2_LDSM_T, SM90_U16x2_STSM_T>("x1.trans", 1) + ",\n" +
          matrices<SM75_U16x4_LDSM_T, SM90_U16x4_STSM_T>("x2.trans", 2) + ",\n" +
          matrices<SM75_U16x8_LDSM_T, SM90_U16x8_STSM_T>("x4.trans", 4) + "\n  }";
  text += ",\n  \"mma\": {\n" + mma<SM89_16x8x32_F32E4M3E4M3F32_TN>("m16n8k32") + ",\n" +
          mma<SM80_16x8x16_F32BF16BF16F32_TN>("m16n8k16") + "\n  }\n}";
  std::puts(text.c_str());
}
