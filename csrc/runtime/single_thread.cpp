// thread_pool.h for builds without threads: all tasks run on the calling one.
#include "runtime/thread_pool.h"

namespace advkd {

int threads_for(double, int) { return 1; }

void parallel_for(std::int64_t tasks, int, TaskBody body, const void* context) {
  for (std::int64_t task = 0; task < tasks; ++task) body(context, task);
}

}  // namespace advkd
