#include "runtime/convolution.h"
#include "runtime/convolution_plan.h"
#include "runtime/training_kernels.h"

namespace advkd {

void convolution_wgrad(const ConvolutionWgradArgs& args) {
  training_kernels().convolution_wgrad(args, plan_wgrad(args.shape));
}

}  // namespace advkd
