// The Python module advkd._C.
#include "python/bindings.h"
#ifdef ADVKD_HAVE_CUDA
#include "python/cuda_bindings.h"
#endif

#ifdef __clang__
#define ADVKD_COMPILER __VERSION__
#else
#define ADVKD_COMPILER "GCC " __VERSION__
#endif

PYBIND11_MODULE(_C, module) {
  using namespace advkd;
  module.doc() = "Fused kernels of advkd; called through advkd.ops and advkd.engine.";
  module.attr("version") = ADVKD_VERSION;
  module.attr("compiler") = ADVKD_COMPILER;
  bind_dispatch(module);
  bind_noise(module);
  bind_sampling_step(module);
  bind_group_norm_silu(module);
  bind_attention(module);
  bind_convolution(module);
  bind_normed_conv3x3(module);
  bind_plan(module);
  bind_snapshot(module);
#ifdef ADVKD_HAVE_CUDA
  bind_cuda(module);
#else
  module.attr("cuda_left_out") = ADVKD_CUDA_LEFT_OUT;
#endif
}
