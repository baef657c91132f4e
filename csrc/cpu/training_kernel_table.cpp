#include "cpu/kernels.h"
#include "runtime/kernel_table.h"

namespace advkd::ADVKD_ISA {

template <class S>
constexpr GroupNormSiluKernels<S> kGroupNormSilu = {group_norm_silu<S>,
                                                    group_norm_silu_backward<S>};

const TrainingKernelTable training_table = {
    sampling_step, average_pool, kGroupNormSilu<float>, kGroupNormSilu<double>,
    kGroupNormSilu<Float16>, kGroupNormSilu<BFloat16>, attention<double>,
    attention_backward<float>, attention_backward<double>, convolution_wgrad,
};

}  // namespace advkd::ADVKD_ISA
