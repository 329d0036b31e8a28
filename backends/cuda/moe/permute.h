// Rows to their experts, and back.
#pragma once
#include "moekern/kernel.h"

namespace moekern::cuda {

const char* permute_refuses(const PermuteProblem& p);
void permute(const PermuteProblem& p);

const char* unpermute_refuses(const UnpermuteProblem& p);
void unpermute(const UnpermuteProblem& p);

}  // namespace moekern::cuda
