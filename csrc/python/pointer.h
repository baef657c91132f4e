// Addresses as Python hands them over: 0 is a tensor that is not there.
#pragma once

#include <cstdint>

namespace advkd {

// The one conversion of an address to a pointer.
template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace advkd
