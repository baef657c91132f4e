// The parts of the module advkd._C, one file each. None knows torch: advkd/ops and advkd/engine
// hand over addresses, shapes and thread counts, and have checked all of them.
#pragma once

#include <pybind11/pybind11.h>

namespace advkd {

void bind_dispatch(pybind11::module_& module);
void bind_noise(pybind11::module_& module);
void bind_sampling_step(pybind11::module_& module);
void bind_group_norm_silu(pybind11::module_& module);
void bind_attention(pybind11::module_& module);
void bind_convolution(pybind11::module_& module);
void bind_normed_conv3x3(pybind11::module_& module);
void bind_plan(pybind11::module_& module);
void bind_snapshot(pybind11::module_& module);

}  // namespace advkd
