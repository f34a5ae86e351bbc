// The part of the last-level cache that a call counts on.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace steam {
namespace cpu {

struct Cache {
  int64_t reported;    // bytes of the last-level cache, as the system reports them; 0 if it reports none
  int64_t processors;  // the processors that this process may run on

  // Bytes for each processor. A virtual machine reports the cache of its host, and other processes use the cache too. A
  // virtual machine of two cores that reported 300 MB could use 8 MiB for each core in a measurement. 8 MiB are also
  // twice the cache of each of the eight cores of a Zen 3 or 4.
  static constexpr int64_t kEach = int64_t{8} << 20;
  // The size of a cache if the system reports none.
  static constexpr int64_t kUsual = int64_t{24} << 20;

  int64_t counted_on() const;
};

Cache find_cache();

// A processor that claims lines streams only in calls with more threads than this. One of its cores moves about 14 GB/s
// of reads and writes in a copy with claims, a third of which streaming saves. Many cores reach the limit of the
// memory, and then that third counts. The number is a guess: four such cores use less than half of six channels of
// DDR4-2933.
constexpr int64_t kFewThreads = 4;

// How a call stores its outputs. `set` are the bytes that the user set, or negative: then the cache that was found
// decides, and `claims` says whether the processor claims lines (claims_lines() in processor.h).
Stores stores_of(bool claims, int64_t threads, int64_t set, const Cache& found);

// The number of processors that a limit allows, rounded up; 0 if there is no limit. `text` has the form of cgroup's
// cpu.max: "max 100000" or "150000 100000".
int64_t processors_of_limit(const char* text);

}  // namespace cpu
}  // namespace steam
