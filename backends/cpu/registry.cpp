// Turns kernels.inc into rows of data for csrc/bindings/.
#include "cpu/features.h"
#include "cpu/gemm/driver.h"
#include "cpu/limits/driver.h"
#include "cpu/moe/driver.h"
#include "cpu/moe/experts.h"
#include "cpu/parallel.h"
#include "cpu/quant/driver.h"

namespace moekern::cpu {

#define MOEKERN_PACKED(ISA, NEEDS) \
  extern const GemmIsa k_##ISA;    \
  extern const LimitIsa k_limits_##ISA;
#define MOEKERN_ROUTING(ISA, NEEDS) extern const RoutingIsa k_routing_##ISA;
#include "cpu/kernels.inc"

namespace {

template <const GemmIsa& kIsa> const char* stream_refuses(const GemmProblem& p) { return stream_refuses(kIsa, p); }
template <const GemmIsa& kIsa> void run_stream(const GemmProblem& p) { gemm_streamed(kIsa, p); }
template <const GemmIsa& kIsa> const char* packed_refuses(const GemmProblem& p) { return packed_refuses(kIsa, p); }
template <const GemmIsa& kIsa> void run_packed(const GemmProblem& p) { gemm_packed(kIsa, p); }
template <const GemmPair& kIsa>
const char* grouped_refuses(const GroupedGemmProblem& p) {
  return grouped_refuses(kIsa, p);
}
template <const GemmPair& kIsa> void run_grouped(const GroupedGemmProblem& p) { gemm_grouped(kIsa, p); }
template <const GemmPair& kIsa>
constexpr Routine<GroupedGemmProblem> grouped{run_grouped<kIsa>, grouped_refuses<kIsa>};
template <const GemmIsa& kIsa> void run_cast(const CastProblem& p) { cast_to_fp8(*kIsa.rows, p); }
template <const GemmIsa& kIsa> void run_silu_mul_cast(const CastProblem& p) { silu_mul_cast_to_fp8(*kIsa.rows, p); }
template <const GemmIsa& kIsa> void run_dequantize(const CastProblem& p) { dequantize(*kIsa.rows, p); }
template <const GemmPair& kIsa>
const char* experts_refuse(const ExpertsProblem& p) {
  return experts_refuse(kIsa, p);
}
template <const GemmPair& kIsa> void run_experts(const ExpertsProblem& p) { fused_experts(kIsa, p); }

template <const GemmIsa& kRows, const RoutingIsa& kIsa> void run_gate(const GateProblem& p) {
  gate(*kRows.rows, kIsa, p);
}
template <const GemmIsa& kRows, const RoutingIsa& kIsa> void run_permute(const PermuteProblem& p) {
  permute(*kRows.rows, kIsa, p);
}
template <const RoutingIsa& kIsa> void run_unpermute(const UnpermuteProblem& p) { unpermute(kIsa, p); }

template <const LimitIsa& kIsa> int64_t run_multiply_add(int threads) { return limit_multiply_add(kIsa, threads); }
template <const LimitIsa& kIsa> void run_read(int loop, const char* src, int64_t bytes, int threads) {
  limit_read(kIsa, loop, src, bytes, threads);
}
template <const LimitIsa& kIsa> void run_copy(const char* src, int64_t bytes, char* dst, int threads) {
  limit_copy(kIsa, src, bytes, dst, threads);
}

#define MOEKERN_EXPERTS(NAME, STREAM, PACKED, NEEDS) constexpr GemmPair k_pair_##NAME{STREAM, &PACKED};
#include "cpu/kernels.inc"

constexpr GemmKernel kGemm[] = {
#define MOEKERN_STREAM(ISA, NEEDS) {"cpu." #ISA "_stream", NEEDS, {run_stream<k_##ISA>, stream_refuses<k_##ISA>}},
#define MOEKERN_PACKED(ISA, NEEDS) {"cpu." #ISA, NEEDS, {run_packed<k_##ISA>, packed_refuses<k_##ISA>}},
#include "cpu/kernels.inc"
};

// By specialisation, since gcc's UBSan takes a comparison of an address with null for no constant.
template <const GemmIsa* kStream> constexpr bool has_stream = true;
template <> constexpr bool has_stream<nullptr> = false;

// Gradients, as k-grouped products have them, are not contiguous along k, as a streaming GEMM's weights have to be.
constexpr GroupedGemmKernel kGroupedGemm[] = {
#define MOEKERN_EXPERTS(NAME, STREAM, PACKED, NEEDS) \
  {"cpu." #NAME, NEEDS, grouped<k_pair_##NAME>,      \
   has_stream<STREAM> ? Routine<GroupedGemmProblem>{} : grouped<k_pair_##NAME>},
#include "cpu/kernels.inc"
};

constexpr CastKernel kCast[] = {
#define MOEKERN_CAST(ISA, NEEDS) \
  {"cpu." #ISA, NEEDS, {run_cast<k_##ISA>}, {run_silu_mul_cast<k_##ISA>}, {run_dequantize<k_##ISA>}},
#include "cpu/kernels.inc"
};

constexpr RoutingKernel kRouting[] = {
#define MOEKERN_ROUTING(ISA, NEEDS)         \
  {"cpu." #ISA,                             \
   NEEDS,                                   \
   {run_gate<k_##ISA, k_routing_##ISA>},    \
   {run_permute<k_##ISA, k_routing_##ISA>}, \
   {run_unpermute<k_routing_##ISA>}},
#include "cpu/kernels.inc"
};

constexpr ExpertsKernel kExperts[] = {
#define MOEKERN_EXPERTS(NAME, STREAM, PACKED, NEEDS) \
  {"cpu." #NAME, NEEDS, {run_experts<k_pair_##NAME>, experts_refuse<k_pair_##NAME>}, experts_workspace_bytes},
#include "cpu/kernels.inc"
};

// Every ISA has a packed kernel.
constexpr LimitLoops kLimits[] = {
#define MOEKERN_PACKED(ISA, NEEDS) \
  {"cpu." #ISA, NEEDS, run_multiply_add<k_limits_##ISA>, run_read<k_limits_##ISA>, run_copy<k_limits_##ISA>},
#include "cpu/kernels.inc"
};

}  // namespace

const Backend& backend() {
  static const Backend instance{{kGemm, sizeof kGemm / sizeof *kGemm},
                                {kGroupedGemm, sizeof kGroupedGemm / sizeof *kGroupedGemm},
                                {kCast, sizeof kCast / sizeof *kCast},
                                {kRouting, sizeof kRouting / sizeof *kRouting},
                                {kExperts, sizeof kExperts / sizeof *kExperts},
                                {kLimits, sizeof kLimits / sizeof *kLimits},
                                {kFeatures, sizeof kFeatures / sizeof *kFeatures},
                                detect_features,
                                thread_team};
  return instance;
}

}  // namespace moekern::cpu
