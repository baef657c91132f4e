#include "runtime/training_kernels.h"

#include "runtime/dispatch.h"

namespace advkd {

const TrainingKernelTable& training_kernels() {
  [[maybe_unused]] const KernelTable* const in_use = &kernels();
#ifdef ADVKD_HAVE_AVX512
  if (in_use == &avx512::table) return avx512::training_table;
#endif
#ifdef ADVKD_HAVE_AVX2
  if (in_use == &avx2::table) return avx2::training_table;
#endif
#ifdef ADVKD_HAVE_NEON
  if (in_use == &neon::table) return neon::training_table;
#endif
#ifdef ADVKD_HAVE_PORTABLE
  return portable::training_table;
#endif
}

}  // namespace advkd
