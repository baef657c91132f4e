// Checks of a plan as a whole, before it may run.
#include <algorithm>
#include <limits>
#include <utility>

#include "runtime/plan_step.h"

namespace advkd {
namespace {

constexpr std::int64_t kLargestBatch = 1 << 20;
constexpr std::int64_t kLargestTable = 1 << 30;

// Channels of a buffer that have been written to, as disjoint ranges.
class Written {
 public:
  void add(std::int64_t first, std::int64_t end) {
    std::vector<std::pair<std::int64_t, std::int64_t>> ranges;
    for (const auto& range : ranges_) {
      if (range.second < first || range.first > end) {
        ranges.push_back(range);
      } else {
        first = std::min(first, range.first);
        end = std::max(end, range.second);
      }
    }
    ranges.emplace_back(first, end);
    ranges_ = std::move(ranges);
  }
  bool covers(std::int64_t first, std::int64_t end) const {
    return std::any_of(ranges_.begin(), ranges_.end(), [&](const auto& range) {
      return range.first <= first && end <= range.second;
    });
  }

 private:
  std::vector<std::pair<std::int64_t, std::int64_t>> ranges_;
};

// The first and the last operation that a buffer takes part in.
struct Life {
  std::size_t first = std::numeric_limits<std::size_t>::max(), last = 0;
};

void check_one(const std::vector<Access>& accesses, const std::string& name) {
  for (std::size_t i = 0; i < accesses.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      const Slice &a = accesses[i].slice, &b = accesses[j].slice;
      const bool apart = a.buffer != b.buffer || a.channel + a.channels <= b.channel ||
                         b.channel + b.channels <= a.channel;
      if (!apart && (accesses[i].writes || accesses[j].writes)) {
        corrupt(name + " writes to what it reads or writes");
      }
    }
  }
}

}  // namespace

void check_sizes(const PlanData& plan) {
  if (plan.buffers.size() < 2) corrupt("it has no input and output");
  if (plan.arena < 0 || plan.conditioning < 0 || plan.classes < 0 || plan.weights_size < 0) {
    corrupt("a size is negative");
  }
  if (plan.conditioning > kLargestTable || plan.classes > kLargestTable) {
    corrupt("a size is out of bounds");
  }
  if (plan.batch < 1 || plan.batch > kLargestBatch) corrupt("its batch is out of bounds");
  product(plan.arena, product(kLargestBatch, sizeof(float)));
  for (std::size_t i = 0; i < plan.buffers.size(); ++i) {
    const PlanBuffer& b = plan.buffers[i];
    const std::string name = "buffer " + std::to_string(i);
    if (b.pixels < 1 || b.pixels > kLargestSide * kLargestSide || b.channels < 1 ||
        b.channels > kLargestSide * kLargestSide) {
      corrupt(name + " has an impossible shape");
    }
    const std::int64_t size = product(b.pixels, b.channels);
    if (i < 2) {
      if (b.offset != 0) corrupt(name + " has an offset");
    } else if (b.offset < 0 || b.offset % kAlignment != 0 || sum(b.offset, size) > plan.arena) {
      corrupt(name + " does not lie in the arena");
    }
  }
}

void check_flow(const PlanData& plan, const std::vector<std::unique_ptr<PlanStep>>& steps) {
  std::vector<Written> written(plan.buffers.size());
  std::vector<Life> lives(plan.buffers.size());
  written[0].add(0, plan.buffers[0].channels);
  for (std::size_t i = 0; i < steps.size(); ++i) {
    const std::string name = "operation " + std::to_string(i);
    const std::vector<Access>& accesses = steps[i]->accesses();
    check_one(accesses, name);
    for (const Access& access : accesses) {
      const Slice& slice = access.slice;
      const std::size_t buffer = static_cast<std::size_t>(slice.buffer);
      Life& life = lives[buffer];
      life.first = std::min(life.first, i);
      life.last = i;
      if (!access.writes) {
        if (!written[buffer].covers(slice.channel, slice.channel + slice.channels)) {
          corrupt(name + " reads what nothing has written");
        }
      } else if (buffer == 0) {
        corrupt(name + " writes to the input");
      }
    }
    for (const Access& access : accesses) {
      const Slice& slice = access.slice;
      if (access.writes) {
        written[static_cast<std::size_t>(slice.buffer)].add(slice.channel,
                                                            slice.channel + slice.channels);
      }
    }
  }
  if (!written[1].covers(0, plan.buffers[1].channels)) corrupt("nothing writes the whole output");
  for (std::size_t i = 2; i < lives.size(); ++i) {
    for (std::size_t j = 2; j < i; ++j) {
      const PlanBuffer &a = plan.buffers[i], &b = plan.buffers[j];
      const bool together = lives[i].first <= lives[j].last && lives[j].first <= lives[i].last;
      const bool overlap = a.offset < b.offset + b.pixels * b.channels &&
                           b.offset < a.offset + a.pixels * a.channels;
      if (together && overlap) {
        corrupt("buffers " + std::to_string(j) + " and " + std::to_string(i) + " overlap");
      }
    }
  }
}

}  // namespace advkd
