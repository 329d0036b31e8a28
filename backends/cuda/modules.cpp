#include "cuda/modules.h"

namespace moekern::cuda {

#define MOEKERN_MODULE(NAME) extern const Module k_module_##NAME;
#include "cuda/modules.inc"
#undef MOEKERN_MODULE

Table<const Module*> modules() {
  static const Module* const all[] = {
#define MOEKERN_MODULE(NAME) &k_module_##NAME,
#include "cuda/modules.inc"
#undef MOEKERN_MODULE
  };
  return {all, sizeof all / sizeof *all};
}

}  // namespace moekern::cuda
