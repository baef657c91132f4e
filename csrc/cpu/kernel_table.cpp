#include "runtime/kernel_table.h"

#include "cpu/kernels.h"

#define ADVKD_TEXT_OF(name) #name
#define ADVKD_TEXT(name) ADVKD_TEXT_OF(name)

namespace advkd::ADVKD_ISA {

template <class S>
constexpr GroupNormSiluKernels<S> kGroupNormSilu = {group_norm_silu<S>,
                                                    group_norm_silu_backward<S>};

const KernelTable table = {
    ADVKD_TEXT(ADVKD_ISA), philox_uint32, philox_normal, sampling_step,
    kGroupNormSilu<float>, kGroupNormSilu<double>, kGroupNormSilu<Float16>,
    kGroupNormSilu<BFloat16>, group_norm_affine,
    attention<float>, attention<double>, attention_backward<float>, attention_backward<double>,
    pack_convolution, convolution_direct, convolution_winograd2, convolution_winograd4,
    convolution_wgrad,
};

}  // namespace advkd::ADVKD_ISA
