// Memory for a call or a task.
#pragma once

#include <cstdint>
#include <new>

#include "cpu/kernels.h"

namespace advkd::ADVKD_ISA {

// Uninitialized memory on a cache line's boundary; none of size 0.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::int64_t size)
      : data_(size == 0 ? nullptr
                        : static_cast<T*>(::operator new(static_cast<std::size_t>(size) * sizeof(T),
                                                         std::align_val_t{64}))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return data_; }

 private:
  T* const data_;
};

}  // namespace advkd::ADVKD_ISA
