// The grouped products on sm_90a. Which rows are whose only the device knows: extents bound the grids.
#pragma once
#include "moekern/kernel.h"

namespace moekern::cuda {

const char* m_grouped_refuses(const GroupedGemmProblem& p);
void m_grouped(const GroupedGemmProblem& p);

// Where groups have few rows on average.
const char* m_grouped_stream_refuses(const GroupedGemmProblem& p);
void m_grouped_stream(const GroupedGemmProblem& p);

const char* k_grouped_refuses(const GroupedGemmProblem& p);
void k_grouped(const GroupedGemmProblem& p);

}  // namespace moekern::cuda
