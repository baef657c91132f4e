#include "runtime/dispatch.h"

#include <pybind11/stl.h>

#include <string>

#include "python/bindings.h"
#include "runtime/thread_pool.h"

namespace advkd {

void bind_dispatch(pybind11::module_& module) {
  module.def("isa", [] { return std::string(kernels().isa); },
             "The instruction set whose kernels are in use.");
  module.def("isas", &runnable_isas, "The instruction sets that run here, best first.");
  module.def("set_isa", &set_isa, "Use the kernels of another instruction set from now on.");
  module.def("set_worth_sharing", &set_worth_sharing,
             "Set from how many cycles on an operation is shared among threads, and return the "
             "number before.");
}

}  // namespace advkd
