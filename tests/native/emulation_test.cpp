// Tests of the emulation itself: a wrong AMX configuration must fail here as it would on hardware,
// and TDPBF16PS and VDPBF16PS must give the documented numbers.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>

#include "emulated_x86.h"

using moekern::float_bits;

namespace {

int failures = 0;

void expect(bool ok, const char* what) {
  if (ok) return;
  ++failures;
  std::printf("FAILED: %s\n", what);
}

void expect_fault(const char* what, const std::function<void()>& action) {
  try {
    action();
  } catch (const std::logic_error&) {
    return;
  }
  expect(false, what);
}

struct Config {
  uint8_t bytes[64] = {1};
  Config& tile(int t, int rows, int colsb) {
    bytes[16 + 2 * t] = static_cast<uint8_t>(colsb);
    bytes[17 + 2 * t] = static_cast<uint8_t>(colsb >> 8);
    bytes[48 + t] = static_cast<uint8_t>(rows);
    return *this;
  }
  Config& byte(int i, uint8_t value) {
    bytes[i] = value;
    return *this;
  }
  void load() const { _tile_loadconfig(bytes); }
};

void test_configuration() {
  uint8_t memory[16 * 64] = {};
  _tile_release();
  expect_fault("a tile is used before a configuration", [&] { _tile_zero(0); });
  expect_fault("palette 2", [] { Config().byte(0, 2).load(); });
  expect_fault("a start row", [] { Config().byte(1, 3).load(); });
  expect_fault("a reserved byte", [] { Config().byte(2, 1).load(); });
  expect_fault("columns of tile 8", [] { Config().byte(32, 64).load(); });
  expect_fault("rows of tile 8", [] { Config().byte(56, 16).load(); });
  expect_fault("17 rows", [] { Config().tile(0, 17, 64).load(); });
  expect_fault("68 bytes a row", [] { Config().tile(0, 16, 68).load(); });
  expect_fault("rows without columns", [] { Config().tile(0, 16, 0).load(); });
  Config().tile(0, 16, 64).tile(1, 16, 64).tile(2, 16, 64).tile(3, 8, 64).tile(4, 16, 32).tile(5, 16, 62).load();
  expect_fault("a tile without a configuration", [&] { _tile_loadd(7, memory, 64); });
  expect_fault("C and A differ in rows", [] { _tile_dpbf16ps(0, 3, 2); });
  expect_fault("C and B differ in columns", [] { _tile_dpbf16ps(0, 1, 4); });
  expect_fault("A's columns are not B's rows", [] { _tile_dpbf16ps(0, 4, 2); });
  expect_fault("half a pair", [] { _tile_dpbf16ps(0, 5, 2); });
  _tile_dpbf16ps(0, 1, 2);
  _tile_release();
  expect_fault("a tile is used after release", [&] { _tile_stored(0, memory, 64); });
}

// C [rows, columns] += A [rows, 2 pairs] B [pairs, 2 columns] on integers, where every order is exact.
void test_product(int rows, int columns, int pairs) {
  std::mt19937 random(1);
  float c[16][16], a[16][32], b[16][32];
  uint16_t a_bf16[16][32], b_bf16[16][32];
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 32; ++j) {
      if (j < 16) c[i][j] = static_cast<float>(random() % 9) - 4;
      a_bf16[i][j] = moekern::f32_to_bf16(a[i][j] = static_cast<float>(random() % 9) - 4);
      b_bf16[i][j] = moekern::f32_to_bf16(b[i][j] = static_cast<float>(random() % 9) - 4);
    }
  Config().tile(0, rows, 4 * columns).tile(1, rows, 4 * pairs).tile(2, pairs, 4 * columns).load();
  float out[16][16];
  std::memcpy(out, c, sizeof out);
  _tile_loadd(0, c, sizeof *c);
  _tile_loadd(1, a_bf16, sizeof *a_bf16);
  _tile_loadd(2, b_bf16, sizeof *b_bf16);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, out, sizeof *out);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) {
      float want = c[i][j];
      for (int k = 0; i < rows && j < columns && k < pairs; ++k)
        want += a[i][2 * k] * b[k][2 * j] + a[i][2 * k + 1] * b[k][2 * j + 1];
      expect(out[i][j] == want, "an element of a tile product");
    }
  _tile_release();
}

// One element of VDPBF16PS and of TDPBF16PS with a single pair.
float vector_pair(float sum, const uint16_t* a, const uint16_t* b) {
  int x, y;
  std::memcpy(&x, a, 4);
  std::memcpy(&y, b, 4);
  float out[16];
  _mm512_storeu_ps(
      out, _mm512_dpbf16_ps(_mm512_set1_ps(sum), (__m512bh)_mm512_set1_epi32(x), (__m512bh)_mm512_set1_epi32(y)));
  return out[0];
}

float tile_pair(float sum, const uint16_t* a, const uint16_t* b) {
  Config().tile(0, 1, 4).tile(1, 1, 4).tile(2, 1, 4).load();
  _tile_loadd(0, &sum, 4);
  _tile_loadd(1, a, 4);
  _tile_loadd(2, b, 4);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, &sum, 4);
  _tile_release();
  return sum;
}

void test_rounding() {
  const auto bf16 = [](float x) { return moekern::f32_to_bf16(x); };
  // VDPBF16PS rounds after each product, the odd one first; TDPBF16PS adds the pair to the sum at once.
  const uint16_t ones[] = {bf16(1.f), bf16(1.f)}, large_odd[] = {bf16(1.f), bf16(0x1p24f)};
  expect(vector_pair(0x1p-24f, ones, large_odd) == 0x1p24f, "1 + 2^24, ties to even");
  expect(vector_pair(1.f, ones, large_odd) == 0x1p24f, "2^24 + 1 twice, each a tie");
  const uint16_t half_ulps[] = {bf16(0x1p-24f), bf16(0x1p-24f)};
  expect(vector_pair(1.f, ones, half_ulps) == 1.f, "VDPBF16PS: two half ulps one by one");
  expect(tile_pair(1.f, ones, half_ulps) == 1.f + 0x1p-23f, "TDPBF16PS: two half ulps at once");
  const uint16_t subnormal[] = {0x0001, 0x0040}, huge[] = {bf16(0x1p120f), bf16(0x1p120f)},
                 tiny[] = {bf16(0x1p-70f), 0};
  for (auto pair : {vector_pair, tile_pair}) {
    expect(pair(3.f, subnormal, huge) == 3.f, "subnormal inputs are zero");
    expect(float_bits(pair(0x1p-140f, ones, subnormal)) == 0, "a subnormal sum is zero");
    expect(float_bits(pair(0.f, tiny, tiny)) == 0, "a subnormal result is zero");
    expect(pair(0.f, tiny, huge) == 0x1p50f, "an exact product");
  }
}

}  // namespace

int main() {
  test_configuration();
  test_product(16, 16, 16);
  test_product(5, 3, 7);
  test_product(1, 16, 1);
  test_rounding();
  std::printf("%d failures\n", failures);
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
