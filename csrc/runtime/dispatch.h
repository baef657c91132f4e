// Picks the kernels for the processor at run time.
#pragma once

#include <string>
#include <vector>

#include "runtime/kernel_table.h"

namespace advkd {

// The instruction sets that were built and that this processor runs, best first.
std::vector<std::string> runnable_isas();

// The table in use: the best one at start-up, or the one named by the variable ADVKD_ISA, if it can
// run here.
const KernelTable& kernels();

// Uses another set from now on; refuses one that cannot run here.
void set_isa(const std::string& name);

}  // namespace advkd
