// The kernels of training and of teachers' samplers, of the instruction set in use.
#pragma once

#include "runtime/kernel_table.h"

namespace advkd {

const TrainingKernelTable& training_kernels();

}  // namespace advkd
