// The kernels of one instruction set. Each translation unit that includes this is compiled once
// per instruction set, with ADVKD_ISA set to its name; all its code stays in that namespace, so
// that the linker cannot hand one set's inline function to another.
#pragma once

#include "runtime/kernel_table.h"

namespace advkd::ADVKD_ISA {

void philox_uint32(const PhiloxUint32Args& args);
void philox_normal(const PhiloxNormalArgs& args);
void sampling_step(const SamplingStepArgs& args);
void average_pool(const AveragePoolArgs& args);
void group_norm_affine(const GroupNormAffineArgs& args);
void pack_convolution(const ConvolutionShape& shape, const ConvolutionWeights& weights,
                      float* packed);
void convolution_direct(const ConvolutionArgs& args, const ConvolutionPlan& plan);
void convolution_winograd2(const ConvolutionArgs& args, const ConvolutionPlan& plan);
void convolution_winograd4(const ConvolutionArgs& args, const ConvolutionPlan& plan);
void convolution_int8(const ConvolutionArgs& args);
void convolution_wgrad(const ConvolutionWgradArgs& args, const ConvolutionWgradPlan& plan);

template <class S>
void group_norm_silu(const GroupNormSiluArgs<S>& args);
template <class S>
void group_norm_silu_backward(const GroupNormSiluBackwardArgs<S>& args);

std::int64_t attention_workspace(const AttentionShape& shape, int threads);
template <class T>
void attention(const AttentionArgs<T>& args);
template <class T>
void attention_backward(const AttentionBackwardArgs<T>& args);

}  // namespace advkd::ADVKD_ISA
