// The arithmetic of atomics and of copies that reduce.
#pragma once
#include "program.h"

namespace moekern::emulator {

enum class Reduction : uint8_t {
  add,
  minimum,
  maximum,
  increment,
  decrement,
  bit_and,
  bit_or,
  bit_xor,
  exchange,
  compare
};

bool reduction_of(Resolver& r, Reduction& reduction);  // add, min, max, inc, dec, and, or, xor, exch, cas
int tensor_type_of(const std::string& type);           // a PTX type as CUtensorMapDataType
// to = to (reduction) from, elements of a CUtensorMapDataType, `bytes` of them.
void reduce_bytes(uint8_t* to, const uint8_t* from, size_t bytes, int type, Reduction reduction);

}  // namespace moekern::emulator
