#include "cache.h"

#include <unistd.h>

#include <cstdio>
#include <cstring>

#if defined(__linux__)
#  include <sched.h>
#endif

namespace steam {
namespace cpu {
namespace {

// Reads the beginning of a file as text, and returns whether there is any.
bool read_text(const char* path, char* text, std::size_t size) {
  text[0] = '\0';
  std::FILE* file = std::fopen(path, "r");
  if (file == nullptr) return false;
  text[std::fread(text, 1, size - 1, file)] = '\0';
  std::fclose(file);
  return text[0] != '\0';
}

struct Processors {
  int64_t count, first;
};

Processors allowed_processors() {
#if defined(__linux__)
  // A cpu_set_t is too small for the mask of a machine with more than 1024 processors.
  unsigned long mask[1024];
  constexpr int kBits = 8 * sizeof(mask[0]);
  std::memset(mask, 0, sizeof(mask));
  if (sched_getaffinity(0, sizeof(mask), reinterpret_cast<cpu_set_t*>(mask)) == 0) {
    Processors out{0, -1};
    for (int64_t i = 0; i < 1024; ++i) {
      if (mask[i] != 0 && out.first < 0) out.first = i * kBits + __builtin_ctzl(mask[i]);
      out.count += __builtin_popcountl(mask[i]);
    }
    if (out.count > 0) return out;
  }
#endif
  const long online = sysconf(_SC_NPROCESSORS_ONLN);
  return {online > 0 ? online : 1, 0};
}

// The smallest limit of this process's control group and of all groups around it; 0 if there is none. In a container
// the container's own group is the root.
int64_t limited_processors() {
  char text[4096], path[5120], group[4096] = "";
  if (read_text("/proc/self/cgroup", text, sizeof(text))) {
    for (const char* line = text; line != nullptr; line = std::strchr(line, '\n')) {
      line += *line == '\n';
      if (std::sscanf(line, "0::%4095[^\n]", group) == 1) break;
    }
  }
  int64_t least = 0;
  const auto limit = [&] {
    const int64_t processors = processors_of_limit(text);
    if (processors > 0 && (least == 0 || processors < least)) least = processors;
  };
  for (char* end = group + std::strlen(group);; *end = '\0') {
    std::snprintf(path, sizeof(path), "/sys/fs/cgroup%s/cpu.max", group);
    if (read_text(path, text, sizeof(text))) limit();
    if (end == group) break;
    while (end > group && *--end != '/') {
    }
  }
  // The first version of control groups has the limit in two files.
  char period[64];
  if (read_text("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", text, 64) &&
      read_text("/sys/fs/cgroup/cpu/cpu.cfs_period_us", period, sizeof(period))) {
    text[std::strcspn(text, "\n")] = '\0';
    std::snprintf(path, sizeof(path), "%s %s", text, period);
    std::memcpy(text, path, std::strlen(path) + 1);
    limit();
  }
  return least;
}

// The last-level cache of a processor, from the system's files. sysconf is no source, because glibc reports the sum of
// all such caches of a package.
int64_t reported_bytes(int64_t processor) {
  int64_t bytes = 0;
  int deepest = 1;
  for (int index = 0;; ++index) {
    char path[128], text[64], unit = 0;
    int level = 0;
    long long size = 0;
    const auto fact = [&](const char* name) {
      std::snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu%lld/cache/index%d/%s",
                    static_cast<long long>(processor), index, name);
      return read_text(path, text, sizeof(text));
    };
    if (!fact("level") || std::sscanf(text, "%d", &level) != 1) return bytes;
    if (level <= deepest || !fact("size") || std::sscanf(text, "%lld%c", &size, &unit) < 1) continue;
    const int shift = unit == 'K' ? 10 : unit == 'M' ? 20 : unit == 'G' ? 30 : 0;
    if (size <= 0 || size > INT64_MAX >> shift) continue;
    deepest = level;
    bytes = static_cast<int64_t>(size) << shift;
  }
}

}  // namespace

int64_t Cache::counted_on() const {
  int64_t of_all;
  if (__builtin_mul_overflow(kEach, processors, &of_all)) of_all = INT64_MAX;
  const int64_t most = reported > 0 ? reported : kUsual;
  return of_all < most ? of_all : most;
}

Stores stores_of(bool claims, int64_t threads, int64_t set, const Cache& found) {
  if (set < 0 && claims && threads <= kFewThreads) return {INT64_MAX, claims};
  // The inputs need as much of the cache as the outputs.
  return {(set >= 0 ? set : found.counted_on()) / 2, claims};
}

int64_t processors_of_limit(const char* text) {
  long long quota = 0, period = 0;
  if (std::sscanf(text, "%lld %lld", &quota, &period) != 2 || quota <= 0 || period <= 0) return 0;
  return quota / period + (quota % period != 0);
}

Cache find_cache() {
  const Processors allowed = allowed_processors();
  const int64_t limit = limited_processors();
  return {reported_bytes(allowed.first), limit > 0 && limit < allowed.count ? limit : allowed.count};
}

}  // namespace cpu
}  // namespace steam
