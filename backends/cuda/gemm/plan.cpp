#include "cuda/gemm/plan.h"

#include "moekern/choices.h"

namespace moekern::cuda {

TilePlan tile_plan(const PlanCase& of) {
  static auto* choices = new Choices<TilePlan, PlanCase>("moekern.backends.cuda.hopper:tile_plan");
  return (*choices)(of);
}

StreamPlan stream_plan(const PlanCase& of) {
  static auto* choices = new Choices<StreamPlan, PlanCase>("moekern.backends.cuda.hopper:stream_plan");
  return (*choices)(of);
}

}  // namespace moekern::cuda
