// The part of the module advkd._C that advkd/plan/ and advkd/sampling.py use.
#pragma once

#include <pybind11/pybind11.h>

namespace advkd {

void bind_plan(pybind11::module_& module);

}  // namespace advkd
