// The rows of this backend for csrc/bindings/, best first.
#include "cuda/driver.h"
#include "cuda/gemm/dense.h"
#include "cuda/gemm/grouped.h"
#include "cuda/modules.h"
#include "cuda/moe/gate.h"
#include "cuda/moe/permute.h"
#include "cuda/quant/cast.h"
#include "cuda/quant/dequantize.h"

namespace moekern::cuda {
namespace {

constexpr uint64_t kHopper = 1;  // sm_90, and a driver that can run these kernels: backends/cuda/__init__.py probes it

constexpr Feature kFeatures[] = {{kHopper, "hopper"}};

constexpr GemmKernel kGemm[] = {{"cuda.hopper_stream", kHopper, {gemm_stream, gemm_stream_refuses}},
                                {"cuda.hopper", kHopper, {gemm, gemm_refuses}}};

constexpr GroupedGemmKernel kGrouped[] = {
    {"cuda.hopper_stream", kHopper, {m_grouped_stream, m_grouped_stream_refuses}, {}},
    {"cuda.hopper", kHopper, {m_grouped, m_grouped_refuses}, {k_grouped, k_grouped_refuses}}};

constexpr CastKernel kCast[] = {{"cuda.hopper",
                                 kHopper,
                                 {cast_to_fp8, cast_refuses},
                                 {silu_mul_cast_to_fp8, cast_refuses},
                                 {dequantize, dequantize_refuses}}};

constexpr RoutingKernel kRouting[] = {
    {"cuda.hopper", kHopper, {gate, gate_refuses}, {permute, permute_refuses}, {unpermute, unpermute_refuses}}};

template <class Row, int N>
constexpr Table<Row> table(const Row (&rows)[N]) {
  return {rows, N};
}

}  // namespace

const Backend& backend() {
  static const DriverKernels driver{modules(), use_driver, why_no_driver};
  static const Backend instance{table(kGemm), table(kGrouped),  table(kCast), table(kRouting), {},
                                {},           table(kFeatures), nullptr,      nullptr,         &driver};
  return instance;
}

}  // namespace moekern::cuda
