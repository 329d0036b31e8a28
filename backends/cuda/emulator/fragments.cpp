#include "program.h"

namespace moekern::emulator {

void add_fragments(Table&) {}

}  // namespace moekern::emulator
