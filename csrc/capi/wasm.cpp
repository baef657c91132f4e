// What a browser needs beside the C API: memory for what it hands over, and endings that print
// nothing, since printing would be a tenth of the module.
#include <cstdlib>
#include <new>

#define ADVKD_EXPORT(name) extern "C" __attribute__((export_name(#name)))

ADVKD_EXPORT(advkd_allocate) void* advkd_allocate(std::size_t size) { return std::malloc(size); }

ADVKD_EXPORT(advkd_free) void advkd_free(void* memory) { std::free(memory); }

// Without exceptions no caller could go on without memory.
void* operator new(std::size_t size) {
  void* const memory = std::malloc(size);
  if (memory == nullptr) __builtin_trap();
  return memory;
}

void* operator new(std::size_t size, std::align_val_t boundary) {
  const std::size_t step = static_cast<std::size_t>(boundary);
  void* const memory = std::aligned_alloc(step, (size + step - 1) / step * step);
  if (memory == nullptr) __builtin_trap();
  return memory;
}

void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }

namespace std {
inline namespace __1 {

// libc++ provides this one for programs to replace.
[[noreturn]] void __libcpp_verbose_abort(const char*, ...) noexcept { __builtin_trap(); }

}  // namespace __1
}  // namespace std
