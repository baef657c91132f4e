// Runs independent tasks on a few threads that sleep between jobs.
#pragma once

#include <atomic>
#include <cstdint>

namespace advkd {

// How many of the threads work of so many cycles is worth waking: a little work is done before
// another core wakes, and if that core is busy, it is waited for.
int threads_for(double cycles, int threads);

// Sets from how many cycles on work is shared, and returns the number before; with 0 all work is.
double set_worth_sharing(double cycles);

using TaskBody = void (*)(const void* context, std::int64_t task);

// Calls body(context, task) once for each task in [0, tasks), on at most `threads` threads, the
// calling one included; returns when all are done. Tasks are handed out one at a time, in order.
// The first exception thrown by a task ends the handing out and is rethrown here. A nested call,
// or one made while another thread's job runs, does its tasks on the calling thread.
void parallel_for(std::int64_t tasks, int threads, TaskBody body, const void* context);

template <class Function>
void parallel_for(std::int64_t tasks, int threads, const Function& function) {
  parallel_for(
      tasks, threads,
      [](const void* context, std::int64_t task) {
        (*static_cast<const Function*>(context))(task);
      },
      &function);
}

// Calls task(index, slot) for each index in [0, count) on the threads; no two threads have the same
// slot at a time, so that each slot may have memory of its own.
template <class Task>
void for_each_slot(std::int64_t count, int threads, const Task& task) {
  std::atomic<std::int64_t> next{0};
  parallel_for(threads, threads, [&](std::int64_t slot) {
    for (;;) {
      const std::int64_t index = next.fetch_add(1, std::memory_order_relaxed);
      if (index >= count) return;
      task(index, slot);
    }
  });
}

}  // namespace advkd
