// Runs a launch to its end, or throws a Fault whose text says where and why.
#pragma once
#include "program.h"

namespace moekern::emulator {

void run(Launch& launch);

}  // namespace moekern::emulator
