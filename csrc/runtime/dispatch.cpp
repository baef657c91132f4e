#include "runtime/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#ifdef ADVKD_HAVE_AVXVNNI
#include <cpuid.h>
#endif
#if defined(ADVKD_HAVE_NEONDOT) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "runtime/convolution_int8.h"
#include "runtime/error.h"

namespace advkd {
namespace {

// Best first.
struct Tables {
  const KernelTable* at[4] = {};
  int count = 0;

  Tables() {
#ifdef ADVKD_HAVE_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("fma")) {
      at[count++] = &avx512::table;
    }
#endif
#ifdef ADVKD_HAVE_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) at[count++] = &avx2::table;
#endif
#ifdef ADVKD_HAVE_NEON
    at[count++] = &neon::table;
#endif
#ifdef ADVKD_HAVE_WASM
    at[count++] = &wasm::table;
#endif
#ifdef ADVKD_HAVE_PORTABLE
    at[count++] = &portable::table;
#endif
  }
};

// Null where it was not built or does not run here.
const KernelTable* table_named(const char* name) {
  const Tables tables;
  for (int i = 0; i < tables.count; ++i) {
    if (std::strcmp(name, tables.at[i]->isa) == 0) return tables.at[i];
  }
  return nullptr;
}

#ifdef ADVKD_HAVE_AVXVNNI
// By cpuid: older compilers do not know its name.
bool runs_avxvnni() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 4 & 1) != 0;
}
#endif

#ifdef ADVKD_HAVE_NEONDOT
bool runs_neondot() {
#ifdef __linux__
  constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & kDotProducts) != 0;
#else
  return true;  // as every processor of Apple
#endif
}
#endif

[[noreturn]] void refuse_isa(const std::string& name) {
  refuse("the instruction set '" + name + "' was not built or does not run here");
}

const KernelTable* initial_table() {
#ifndef __wasm__
  const char* const name = std::getenv("ADVKD_ISA");
  if (name != nullptr && *name != '\0') {
    if (const KernelTable* const named = table_named(name)) return named;
    refuse_isa(name);
  }
#endif
  return Tables().at[0];
}

std::atomic<const KernelTable*>& current() {
  static std::atomic<const KernelTable*> table{initial_table()};
  return table;
}

}  // namespace

std::vector<std::string> runnable_isas() {
  const Tables tables;
  std::vector<std::string> names;
  for (int i = 0; i < tables.count; ++i) names.emplace_back(tables.at[i]->isa);
  return names;
}

Int8Convolution int8_convolution() {
#ifdef ADVKD_HAVE_AVX512VNNI
  if (&kernels() == &avx512::table && __builtin_cpu_supports("avx512vnni")) {
    return avx512vnni::convolution_int8;
  }
#endif
#ifdef ADVKD_HAVE_AVXVNNI
  if (&kernels() == &avx2::table && runs_avxvnni()) return avxvnni::convolution_int8;
#endif
#ifdef ADVKD_HAVE_NEONDOT
  if (runs_neondot()) return neondot::convolution_int8;
#endif
  return nullptr;
}

const KernelTable& kernels() { return *current().load(); }

void set_isa(const std::string& name) {
  const KernelTable* const table = table_named(name.c_str());
  if (table == nullptr) refuse_isa(name);
  current().store(table);
}

}  // namespace advkd
