// A copy whose stores pass the cache: how fast memory can be read and written, which other kernels
// are measured by.
#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/storage.h"
#include "cpu/thread_pool.h"

namespace advkd::ADVKD_ISA {
namespace {

constexpr std::int64_t kTaskElements = 1 << 16;

void copy_part(const float* from, float* to, std::int64_t n) {
  constexpr int lanes = kLanesOf<float>;
  std::int64_t i = 0;
  while (i < n && !streams_to(to + i, 0)) {
    to[i] = from[i];
    ++i;
  }
  for (; i + lanes <= n; i += lanes) stream(to + i, load_vector(from + i));
  std::memcpy(to + i, from + i, static_cast<std::size_t>(n - i) * sizeof(float));
  end_streaming();
}

}  // namespace

void copy_float32(const CopyArgs& args) {
  const std::int64_t tasks = (args.count + kTaskElements - 1) / kTaskElements;
  parallel_for(tasks, args.threads, [&](std::int64_t task) {
    const std::int64_t first = task * kTaskElements, rest = args.count - first;
    copy_part(args.from + first, args.to + first, rest < kTaskElements ? rest : kTaskElements);
  });
}

}  // namespace advkd::ADVKD_ISA
