// How the runtime refuses what it is given: with an exception, or, where a build has none (browsers),
// through a function of the host that does not return.
#pragma once

#include <string>

#ifdef __cpp_exceptions
#include <stdexcept>
#else
extern "C" [[noreturn]]
__attribute__((import_module("env"), import_name("advkd_refuse")))
void advkd_refuse(const char* text, std::size_t length);
#endif

namespace advkd {

[[noreturn]] inline void refuse(const std::string& what) {
#ifdef __cpp_exceptions
  throw std::invalid_argument(what);
#else
  advkd_refuse(what.data(), what.size());
#endif
}

}  // namespace advkd
