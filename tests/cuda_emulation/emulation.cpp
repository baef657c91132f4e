// Fibers: each of a block's threads has a stack of its own, and a scheduler lets them run in turn.
// Compiled without instrumentation, so that the thread sanitizer sees only the kernels' accesses, and
// knows of each barrier what is said here.
#include "emulation.h"

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdlib>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

#include "controls.h"

#ifdef EMULATION_TSAN
#include <sanitizer/tsan_interface.h>
#else
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
#endif
#ifdef EMULATION_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
static void __asan_unpoison_memory_region(void*, std::size_t) {}
#endif

namespace emulation {

dim3 thread_index, block_index, block_size, grid_size;

namespace {

constexpr std::size_t kStack = 64 << 10;

#if defined(__x86_64__)
// Saves what a call keeps, and goes on where `to` was saved: ucontext would ask the kernel each time.
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
struct Context {
  void* stack_pointer;

  void begin(char* stack, void (*entry)()) {
    // Six registers, then where to return to; the entry must find its stack as after a call.
    auto top = reinterpret_cast<std::uintptr_t>(stack + kStack) & ~std::uintptr_t{15};
    void** words = reinterpret_cast<void**>(top) - 8;
    std::memset(words, 0, 8 * sizeof *words);
    words[6] = reinterpret_cast<void*>(entry);
    stack_pointer = words;
  }
  static void change(Context& from, Context& to) {
    emulation_switch(&from.stack_pointer, to.stack_pointer);
  }
};
#else
struct Context {
  ucontext_t context;

  void begin(char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStack;
    makecontext(&context, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

enum class State { kReady, kAtBarrier, kDone };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  Context context;
  State state;
  int line;
  void* tsan = nullptr;
};

struct Shared {
  void* at;
  std::size_t bytes;
};

std::vector<Shared> shared_arrays;
std::vector<std::unique_ptr<Fiber>> fibers;
Context scheduler;
unsigned current = 0, order_of_all = 0;
bool moved = false;
char barrier_tag;
std::exception_ptr failure;
const std::function<void()>* running = nullptr;
sigjmp_buf outside;
#ifdef EMULATION_TSAN
void* tsan_scheduler;
#endif
#ifdef EMULATION_ASAN
const void* scheduler_stack;
std::size_t scheduler_size;
#endif

void to_scheduler() {
#ifdef EMULATION_TSAN
  __tsan_switch_to_fiber(tsan_scheduler, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef EMULATION_ASAN
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, scheduler_stack, scheduler_size);
#endif
  Context::change(fibers[current]->context, scheduler);
#ifdef EMULATION_ASAN
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_size);
#endif
}

void to_fiber(unsigned index) {
  current = index;
  thread_index = {index, 0, 0};
  Fiber& fiber = *fibers[index];
#ifdef EMULATION_TSAN
  __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef EMULATION_ASAN
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack.get(), kStack);
#endif
  Context::change(scheduler, fiber.context);
#ifdef EMULATION_ASAN
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void fiber_entry() {
#ifdef EMULATION_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
  try {
    (*running)();
  } catch (...) {
    failure = std::current_exception();
  }
  fibers[current]->state = State::kDone;
  moved = true;
  __tsan_release(&barrier_tag);
  to_scheduler();
  std::abort();
}

std::vector<unsigned> ordered(unsigned count, unsigned salt) {
  std::vector<unsigned> found(count);
  std::iota(found.begin(), found.end(), 0u);
  if (order_of_all == 1) return {found.rbegin(), found.rend()};
  std::minstd_rand random(order_of_all * 7919 + salt);
  if (order_of_all > 1) std::shuffle(found.begin(), found.end(), random);
  return found;
}

// Nobody can go on: lets those at the barrier pass it, if all that still run are there.
void release_barrier() {
  int line = 0;
  for (const auto& fiber : fibers) {
    if (fiber->state == State::kReady) fail("threads wait for others that never arrive");
    if (fiber->state != State::kAtBarrier) continue;
    if (line != 0 && line != fiber->line) fail("threads wait at different barriers");
    line = fiber->line;
  }
  for (const auto& fiber : fibers) {
    if (fiber->state == State::kAtBarrier) fiber->state = State::kReady;
  }
}

void run_block(unsigned block) {
  block_index = {block, 0, 0};
  for (const Shared& array : shared_arrays) std::memset(array.at, 0xFF, array.bytes);
  for (const auto& fiber : fibers) {
    fiber->state = State::kReady;
    __asan_unpoison_memory_region(fiber->stack.get(), kStack);  // its last frames never returned
    fiber->context.begin(fiber->stack.get(), fiber_entry);
#ifdef EMULATION_TSAN
    fiber->tsan = __tsan_create_fiber(0);
#endif
  }
  const std::vector<unsigned> order = ordered(static_cast<unsigned>(fibers.size()), block);
  for (bool live = true; live;) {
    live = moved = false;
    for (const unsigned index : order) {
      if (fibers[index]->state == State::kReady) to_fiber(index);
      if (failure) std::rethrow_exception(failure);
      live = live || fibers[index]->state != State::kDone;
    }
    if (live && !moved) release_barrier();
  }
#ifdef EMULATION_TSAN
  // Blocks come one after the other; only those of one block race here.
  __tsan_acquire(&barrier_tag);
  for (const auto& fiber : fibers) __tsan_destroy_fiber(fiber->tsan);
#endif
}

#if !defined(EMULATION_TSAN) && !defined(EMULATION_ASAN)
void outside_memory(int) { siglongjmp(outside, 1); }

struct GuardedPages {
  struct sigaction before[2];
  GuardedPages() {
    struct sigaction action = {};
    action.sa_handler = outside_memory;
    sigaction(SIGSEGV, &action, &before[0]);
    sigaction(SIGBUS, &action, &before[1]);
  }
  ~GuardedPages() {
    sigaction(SIGSEGV, &before[0], nullptr);
    sigaction(SIGBUS, &before[1], nullptr);
  }
};
#else
struct GuardedPages {
  int unused = 0;
};
#endif

}  // namespace

void set_order(unsigned order) { order_of_all = order; }

void fail(const std::string& what) { throw std::runtime_error(what); }

void register_shared(void* at, std::size_t bytes) {
  shared_arrays.push_back({at, bytes});
  std::memset(at, 0xFF, bytes);
}

void barrier(int line) {
  Fiber& fiber = *fibers[current];
  fiber.state = State::kAtBarrier;
  fiber.line = line;
  moved = true;
  __tsan_release(&barrier_tag);
  to_scheduler();
  __tsan_acquire(&barrier_tag);
}

void run_grid(const std::string& kernel, unsigned grid, unsigned block,
              const std::function<void()>& body) {
  if (block < 1 || block > 1024 || grid < 1) fail(kernel + " is launched with an impossible size");
  while (fibers.size() < block) fibers.push_back(std::make_unique<Fiber>());
  fibers.resize(block);
  block_size = {block, 1, 1};
  grid_size = {grid, 1, 1};
  running = &body;
  failure = nullptr;
#ifdef EMULATION_TSAN
  tsan_scheduler = __tsan_get_current_fiber();
#endif
  const GuardedPages guarded = {};
  if (sigsetjmp(outside, 1) != 0) fail(kernel + " reads or writes outside its memory");
  try {
    for (const unsigned index : ordered(grid, 1)) run_block(index);
  } catch (const std::exception& error) {
    fail(kernel + ": " + error.what());
  }
}

}  // namespace emulation
