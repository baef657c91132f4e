#include "runtime/kernel_table.h"

#include "cpu/kernels.h"

#define ADVKD_TEXT_OF(name) #name
#define ADVKD_TEXT(name) ADVKD_TEXT_OF(name)

namespace advkd::ADVKD_ISA {

const KernelTable table = {
    ADVKD_TEXT(ADVKD_ISA), philox_uint32, philox_normal, group_norm_affine,
    attention_workspace, attention<float>,
    pack_convolution, convolution_direct, convolution_winograd2, convolution_winograd4,
};

}  // namespace advkd::ADVKD_ISA
