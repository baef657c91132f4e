#include "runtime/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#ifdef __x86_64__
#include <cpuid.h>
#endif
#if defined(ADVKD_HAVE_NEONDOT) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "runtime/convolution_int8.h"
#include "runtime/error.h"

namespace advkd {
namespace {

#ifdef __x86_64__
// What the processor runs and the system saves. __builtin_cpu_supports links to a runtime that not
// every compiler brings for every system.
struct Processor {
  bool avx2 = false, avx512 = false, avxvnni = false, avx512vnni = false;

  Processor() {
    unsigned eax, ebx, ecx, edx, saved, high;
    const auto bit = [](unsigned word, int number) { return (word >> number & 1) != 0; };
    if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0 || !bit(ecx, 27)) return;  // OSXSAVE
    const bool fma = bit(ecx, 12);
    asm volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if ((saved & 0x6) != 0x6 || __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return;
    avx2 = fma && bit(ebx, 5);
    // F, DQ, BW, VL
    avx512 = (saved & 0xe0) == 0xe0 && fma && bit(ebx, 16) && bit(ebx, 17) && bit(ebx, 30) &&
             bit(ebx, 31);
    avx512vnni = avx512 && bit(ecx, 11);
    const bool has_more = __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0;
    avxvnni = avx2 && has_more && bit(eax, 4);
  }
};
#endif

// Best first.
struct Tables {
  const KernelTable* at[4] = {};
  int count = 0;

  Tables() {
#ifdef ADVKD_HAVE_AVX512
    if (Processor().avx512) at[count++] = &avx512::table;
#endif
#ifdef ADVKD_HAVE_AVX2
    if (Processor().avx2) at[count++] = &avx2::table;
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
  if (&kernels() == &avx512::table && Processor().avx512vnni) {
    return avx512vnni::convolution_int8;
  }
#endif
#ifdef ADVKD_HAVE_AVXVNNI
  if (&kernels() == &avx2::table && Processor().avxvnni) return avxvnni::convolution_int8;
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
