// Addresses as Python hands them over.
#pragma once

#include <cstdint>

namespace advkd {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace advkd
