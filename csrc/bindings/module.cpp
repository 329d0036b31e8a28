// moekern._C: Python objects in, views and kernel rows out. One file an op family beside this one.
#include "bindings/tensors.h"

namespace moekern {

#define MOEKERN_BACKEND(NAME) \
  namespace NAME {            \
  const Backend& backend();   \
  }
#include "moekern/backends.inc"
#undef MOEKERN_BACKEND

namespace {

// {module: (its image, [kernel])}
py::dict modules_of(const DriverKernels& driver) {
  py::dict modules;
  for (const Module* m : driver.modules)
    modules[m->name] = py::make_tuple(py::bytes(reinterpret_cast<const char*>(m->image), m->end - m->image),
                                      std::vector<std::string>(m->kernels.begin(), m->kernels.end()));
  return modules;
}

py::dict rows_of(const Backend& backend) {
  py::dict rows;
  rows["features"] = py::cpp_function([&backend] { return names_of(backend.detect_features(), backend.features); });
  if (backend.thread_team) rows["thread_team"] = py::cpp_function(backend.thread_team);
  KernelRows kernels;
  gemm_rows(backend, kernels);
  grouped_rows(backend, kernels);
  cast_rows(backend, kernels);
  routing_rows(backend, kernels);
  experts_rows(backend, kernels);
  rows["kernels"] = kernels;
  rows["limits"] = limit_rows(backend);
  if (!backend.driver) return rows;
  const DriverKernels& driver = *backend.driver;
  rows["modules"] = py::cpp_function([&driver] { return modules_of(driver); });
  rows["use_driver"] = py::cpp_function([&driver](const std::optional<std::string>& library) {
    driver.use_driver(library ? library->c_str() : nullptr);
  });
  rows["why_no_driver"] = py::cpp_function([&driver] {
    py::gil_scoped_release release;
    return driver.why_no_driver();
  });
  return rows;
}

void connect(py::object scaled_tensor, py::object tensor, py::object num_threads, py::object read, py::object allocate,
             py::object current_stream, py::dict dtypes) {
  Runtime& r = runtime();
  r = {scaled_tensor, tensor, num_threads, read, allocate, current_stream, dtypes, nullptr};
  if (!py::hasattr(tensor, "__dlpack_c_exchange_api__")) return;
  const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  if (api->header.version.major == 1) r.exchange = api;
}

}  // namespace
}  // namespace moekern

PYBIND11_MODULE(_C, m) {
  using namespace moekern;
  py::register_exception<ValueError>(m, "ValueError", PyExc_ValueError);
  py::register_exception<TypeError>(m, "TypeError", PyExc_TypeError);
#if defined(__clang__)
  m.attr("compiler") = __VERSION__;
#else
  m.attr("compiler") = "GCC " __VERSION__;
#endif
  m.def("connect", &connect);
  m.def("uses_exchange_table", [] { return runtime().exchange != nullptr; });
  bind_choices();
  bind_gemm(m);
  bind_grouped(m);
  bind_casts(m);
  bind_routing(m);
  bind_experts(m);
  py::dict native;
#define MOEKERN_BACKEND(NAME) native[#NAME] = rows_of(NAME::backend());
#include "moekern/backends.inc"
#undef MOEKERN_BACKEND
  m.attr("native") = native;
}
