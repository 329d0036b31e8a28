// The compiled kernels: a module for every file of kernels/, which the build embeds.
#pragma once
#include "moekern/kernel.h"

namespace moekern::cuda {

Table<const Module*> modules();

}  // namespace moekern::cuda
