// How much of the last-level cache a process may hope for.
#pragma once

#include <cstdint>

namespace steam {
namespace cpu {

struct Cache {
  int64_t reported;    // bytes of the last-level cache by the system; 0 where it reports none
  int64_t processors;  // that this process may run on

  // A virtual machine reports its host's cache, and a process shares a cache with its neighbours: so much for each
  // processor is what the two-core virtual machine that it was measured on could use of 300 MB, and twice what Zen 3
  // and 4 have for each of their eight cores.
  static constexpr int64_t kEach = int64_t{8} << 20;
  static constexpr int64_t kUsual = int64_t{24} << 20;
  int64_t share() const;
};

Cache find_cache();

// Processors' worth of time that a limit in the words of cgroup's cpu.max allows, "max 100000" or "150000 100000",
// rounded up; 0 where there is no limit.
int64_t processors_of_limit(const char* text);

}  // namespace cpu
}  // namespace steam
