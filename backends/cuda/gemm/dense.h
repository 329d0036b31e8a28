// fp8_gemm_nt on sm_90a: any number of rows, and few.
#pragma once
#include "moekern/kernel.h"

namespace moekern::cuda {

const char* gemm_refuses(const GemmProblem& p);
void gemm(const GemmProblem& p);

const char* gemm_stream_refuses(const GemmProblem& p);
void gemm_stream(const GemmProblem& p);

}  // namespace moekern::cuda
