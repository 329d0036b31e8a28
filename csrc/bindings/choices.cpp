// What C++ asks Python for: csrc/moekern/choices.h.
#include "moekern/choices.h"

#include "bindings/tensors.h"

namespace moekern {
namespace {

void ask(const char* function, const int64_t* given, int count, int32_t* chosen, int expected) {
  const py::gil_scoped_acquire held;
  const std::string name = function;
  const size_t colon = name.find(':');
  py::tuple arguments(count);
  for (int i = 0; i < count; ++i) arguments[static_cast<size_t>(i)] = given[i];
  const py::object said =
      py::module_::import(name.substr(0, colon).c_str()).attr(name.substr(colon + 1).c_str())(*arguments);
  const auto values = said.cast<std::vector<int32_t>>();
  check(static_cast<int>(values.size()) == expected, name, " returned ", values.size(), " integers; it has to return ",
        expected);
  std::copy(values.begin(), values.end(), chosen);
}

}  // namespace

void bind_choices() { ask_python = ask; }

}  // namespace moekern
