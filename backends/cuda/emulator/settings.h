// What a launch may be told.
#pragma once
#include <cstdint>

namespace moekern::emulator {

enum class Schedule : uint8_t { round_robin, random, producer_greedy, consumer_greedy };
enum class Accumulation : uint8_t { exact, hopper };

struct Settings {
  Schedule schedule = Schedule::round_robin;
  uint64_t seed = 0;
  bool races = true;
  bool poison = true;  // destinations of copies and accumulators hold NaN until they land
  int sms = 8;
  Accumulation accumulation = Accumulation::exact;
  uint64_t patience = 5000000;  // instructions without any progress before a launch counts as hung
};

}  // namespace moekern::emulator
