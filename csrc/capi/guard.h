// What keeps exceptions inside the library.
#pragma once

#include <cstddef>

#include "advkd.h"

#ifdef __cpp_exceptions
#include <exception>
#include <new>
#endif

namespace advkd {

// Copies as much of `what` as fits; `error` may be null.
inline void write_error(char* error, const char* what) {
  if (error == nullptr) return;
  std::size_t i = 0;
  for (; what[i] != '\0' && i + 1 < ADVKD_ERROR_SIZE; ++i) error[i] = what[i];
  error[i] = '\0';
}

// The status of `body()`; what it throws is written to `error`. Builds without exceptions end in
// the host instead (runtime/error.h).
template <class Body>
advkd_status guarded(char* error, advkd_status refused, const Body& body) {
#ifdef __cpp_exceptions
  try {
    body();
    return ADVKD_OK;
  } catch (const std::bad_alloc&) {
    write_error(error, "the system gives no memory");
    return ADVKD_ERROR_MEMORY;
  } catch (const std::exception& refusal) {
    write_error(error, refusal.what());
    return refused;
  }
#else
  (void)error;
  (void)refused;
  body();
  return ADVKD_OK;
#endif
}

}  // namespace advkd
