#include "runtime/thread_pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

namespace advkd {
namespace {

thread_local bool inside_a_task = false;

class Job {
 public:
  Job(std::int64_t tasks, TaskBody body, const void* context)
      : tasks_(tasks), body_(body), context_(context) {}

  // Takes tasks until none is left.
  void work() {
    inside_a_task = true;
    try {
      for (;;) {
        const std::int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
        if (task >= tasks_) break;
        body_(context_, task);
      }
    } catch (...) {
      next_.store(tasks_, std::memory_order_relaxed);
      const std::lock_guard<std::mutex> lock(error_mutex_);
      if (!error_) error_ = std::current_exception();
    }
    inside_a_task = false;
  }

  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  const std::int64_t tasks_;
  const TaskBody body_;
  const void* const context_;
  std::atomic<std::int64_t> next_{0};
  std::mutex error_mutex_;
  std::exception_ptr error_;
};

class Pool {
 public:
  // False where another thread's job occupies the pool.
  bool try_run(Job& job, int threads) {
    const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      grow(threads - 1);
      job_ = &job;
      open_places_ = std::min(threads - 1, workers_);
    }
    for (int i = 0; i < threads - 1; ++i) wake_.notify_one();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    // From here no worker can join; those that never woke are not waited for.
    job_ = nullptr;
    open_places_ = 0;
    done_.wait(lock, [this] { return busy_ == 0; });
    return true;
  }

 private:
  // Called with mutex_ held. A system that gives no more threads leaves the pool smaller.
  void grow(int wanted) {
    if (workers_ >= wanted) return;
    // Signals belong to Python's main thread, so workers start with all of them blocked.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (; workers_ < wanted; ++workers_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  [[noreturn]] void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return open_places_ > 0; });
      --open_places_;
      ++busy_;
      Job* const job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int open_places_ = 0;
  int busy_ = 0;
  int workers_ = 0;
};

// Never destroyed: its workers sleep in it until the process ends.
Pool* pool = new Pool;

// A forked child has none of the parent's threads, and its locks may be held by them.
void start_anew_in_child() { pool = new Pool; }

const int fork_handler = pthread_atfork(nullptr, nullptr, start_anew_in_child);

std::atomic<double> worth_sharing{3e5};

}  // namespace

int threads_for(double cycles, int threads) {
  return cycles < worth_sharing.load(std::memory_order_relaxed) ? 1 : threads;
}

double set_worth_sharing(double cycles) { return worth_sharing.exchange(cycles); }

void parallel_for(std::int64_t tasks, int threads, TaskBody body, const void* context) {
  threads = static_cast<int>(std::min<std::int64_t>(threads, tasks));
  if (!inside_a_task && threads > 1) {
    Job job(tasks, body, context);
    if (pool->try_run(job, threads)) return job.rethrow();
  }
  for (std::int64_t task = 0; task < tasks; ++task) body(context, task);
}

}  // namespace advkd
