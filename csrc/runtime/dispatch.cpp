#include "runtime/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace advkd {
namespace {

std::vector<const KernelTable*> runnable_tables() {
  std::vector<const KernelTable*> tables;
#ifdef ADVKD_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma")) {
    tables.push_back(&avx512::table);
  }
#endif
#ifdef ADVKD_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    tables.push_back(&avx2::table);
  }
#endif
  tables.push_back(&portable::table);
  return tables;
}

const KernelTable& table_named(const std::string& name) {
  for (const KernelTable* table : runnable_tables()) {
    if (name == table->isa) return *table;
  }
  throw std::invalid_argument("the instruction set '" + name +
                              "' was not built or does not run here");
}

const KernelTable* initial_table() {
  const char* name = std::getenv("ADVKD_ISA");
  return name && *name ? &table_named(name) : runnable_tables().front();
}

std::atomic<const KernelTable*>& current() {
  static std::atomic<const KernelTable*> table{initial_table()};
  return table;
}

}  // namespace

std::vector<std::string> runnable_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : runnable_tables()) names.emplace_back(table->isa);
  return names;
}

const KernelTable& kernels() { return *current().load(); }

void set_isa(const std::string& name) { current().store(&table_named(name)); }

}  // namespace advkd
