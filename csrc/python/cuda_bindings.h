// The part of the module advkd._C that needs CUDA.
#pragma once

#include <pybind11/pybind11.h>

namespace advkd {

void bind_cuda(pybind11::module_& module);

}  // namespace advkd
