// Memory of a launch. Every access is checked for its bounds, its alignment, unwritten bytes, and its order with other
// accesses: two accesses of different warps, of which one is a store, need a barrier between them, and two blocks share
// nothing that one of them stores.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <unordered_set>
#include <vector>

#include "numbers.h"
#include "report.h"

namespace ptx {

struct Access {
  uint64_t address;
  int bytes;    // of the whole access
  int element;  // bytes of one number of it
  int lane;
  uint32_t step;         // grows with each point at which the lanes of the warp are ordered
  const uint8_t* value;  // that is stored; null for a load
  bool is_store() const { return value != nullptr; }
};

// Bytes that a GPU moves between its L2 cache and a block at least.
constexpr uint64_t kSector = 32;

// What is known of the accesses to a few bytes.
class History {
 public:
  void note(const Access& access, Report& report, uint32_t epoch, bool shared, bool same, bool close,
            const std::string& values) {
    const int warp = report.place.warp, lane = access.lane, me = report.place.block + 1;
    const uint32_t bit = 1u << warp;
    const bool store = access.is_store();
    if (!shared && !same) between_blocks(access, report, me);
    const bool mine = shared || store_block_ == me;
    if (mine && store_epoch_ == epoch && !same) {
      const bool others = store ? (store_warps_ & ~bit) != 0 : (store_warps_ & bit) == 0;
      if (others && store && close) {
        report.found(report.counts.conflicts, "two warps store different numbers to one address", access.address, lane,
                     values);
      } else if (others) {
        report.found(report.counts.races,
                     store ? "store after another warp's store" : "load after another warp's store", access.address,
                     lane, values);
      } else if (store_lane_ != lane && store_step_ == access.step && (!store || (store_warps_ & ~bit) == 0)) {
        report.found(report.counts.unordered, "access after another lane's store", access.address, lane, values);
      }
    }
    if (store && !same && load_epoch_ == epoch && (shared || load_block_ == me || load_block_ == kSeveral)) {
      if ((load_warps_ & ~bit) != 0) {
        report.found(report.counts.races, "store after another warp's load", access.address, lane);
      } else if (load_lane_ != lane && load_step_ == access.step) {
        report.found(report.counts.unordered, "store after another lane's load", access.address, lane);
      }
    }
    if (store) {
      stored(access, epoch, bit, me, mine && same);
    } else {
      loaded(access, epoch, bit, me);
    }
  }
  bool stored_in(uint32_t epoch) const { return store_epoch_ == epoch; }

 private:
  static constexpr int kSeveral = -1, kSeveralLanes = 255;

  void between_blocks(const Access& access, Report& report, int me) const {
    if (store_block_ != 0 && store_block_ != me) {
      report.found(report.counts.races,
                   access.is_store() ? "store after another block's store" : "load after another block's store",
                   access.address, access.lane);
    }
    if (access.is_store() && load_block_ != 0 && load_block_ != me) {
      report.found(report.counts.races, "store after another block's load", access.address, access.lane);
    }
  }
  void stored(const Access& access, uint32_t epoch, uint32_t bit, int me, bool joins) {
    store_warps_ = joins && store_epoch_ == epoch ? store_warps_ | bit : bit;
    store_lane_ = static_cast<uint8_t>(access.lane);
    store_block_ = me;
    store_epoch_ = epoch;
    store_step_ = access.step;
  }
  void loaded(const Access& access, uint32_t epoch, uint32_t bit, int me) {
    load_block_ = load_block_ == 0 || load_block_ == me ? me : kSeveral;
    if (load_epoch_ == epoch) {
      load_warps_ |= bit;
      if (load_lane_ != access.lane) load_lane_ = kSeveralLanes;
    } else {
      load_epoch_ = epoch;
      load_warps_ = bit;
      load_lane_ = static_cast<uint8_t>(access.lane);
    }
    load_step_ = access.step;
  }

  int store_block_ = 0, load_block_ = 0;       // 0: none
  uint32_t store_epoch_ = 0, load_epoch_ = 0;  // intervals between barriers
  uint32_t store_step_ = 0, load_step_ = 0;    // of the warp that accessed last
  uint32_t store_warps_ = 0, load_warps_ = 0;  // a bit each; those that stored, stored the same
  uint8_t store_lane_ = 0, load_lane_ = 0;
};

class Memory {
 public:
  Memory(const Launch& launch, int warps, Report& report)
      : launch_(launch),
        report_(report),
        shared_(launch.static_shared + launch.dynamic_shared),
        shared_written_(shared_.size()),
        shared_history_(shared_.size()),
        local_(static_cast<size_t>(warps) * 32 * launch.local, 0xFF),
        history_(launch.allocation_count) {}

  void begin_block() {
    std::fill(shared_.begin(), shared_.end(), 0xFF);
    std::fill(shared_written_.begin(), shared_written_.end(), 0);
    loaded_.clear();
    stored_.clear();
    barrier();
  }
  void barrier() { ++epoch_; }
  // Whether the block has loaded the sectors of these bytes of global memory before. A GPU has them in its L1 cache.
  bool has_loaded(uint64_t address, int bytes) const {
    for (uint64_t k = address / kSector; k <= (address + bytes - 1) / kSector; ++k) {
      if (loaded_.count(k) == 0) return false;
    }
    return true;
  }

  static int space_of(uint64_t address, int space) {
    if (space != kSpace_generic) return space;
    if (address >> kPiece == kShared >> kPiece) return kSpace_shared;
    return address >> kPiece == kLocal >> kPiece ? kSpace_local : kSpace_global;
  }

  void load(const Access& access, int space, void* out) { std::memcpy(out, checked(access, space), access.bytes); }
  void store(const Access& access, int space) { std::memcpy(checked(access, space), access.value, access.bytes); }

 private:
  uint8_t* checked(Access access, int space) {
    const char* what = access.is_store() ? "store" : "load";
    if (access.address % access.bytes != 0) {
      report_.fail("misaligned " + std::string(what) + " of " + std::to_string(access.bytes) + " bytes", access.lane);
    }
    const bool generic = space == kSpace_generic;
    switch (space_of(access.address, space)) {
      case kSpace_shared:
        if (generic) access.address -= kShared;
        return shared(access, what);
      case kSpace_local: {
        const uint64_t at = generic ? access.address - kLocal : access.address;
        if (at + access.bytes > static_cast<uint64_t>(launch_.local))
          out_of_bounds("local", what, at, launch_.local, access);
        return &local_[(static_cast<size_t>(report_.place.warp) * 32 + access.lane) * launch_.local + at];
      }
      case kSpace_param:
        if (access.is_store()) report_.fail("store to a parameter", access.lane);
        if (access.address + access.bytes > static_cast<uint64_t>(launch_.parameter_bytes)) {
          out_of_bounds("parameter", what, access.address, launch_.parameter_bytes, access);
        }
        return const_cast<uint8_t*>(launch_.parameters) + access.address;
      default: return global(access, what);
    }
  }

  uint8_t* shared(const Access& access, const char* what) {
    const uint64_t at = access.address, bytes = access.bytes;
    if (at + bytes > shared_.size()) out_of_bounds("shared", what, at, shared_.size(), access);
    uint8_t *memory = &shared_[at], *written = &shared_written_[at];
    const bool known = std::memchr(written, 0, bytes) == nullptr;
    const bool same = access.is_store() && known && std::memcmp(access.value, memory, bytes) == 0;
    bool close = false;
    std::string values;
    if (access.is_store() && !same && shared_history_[at].stored_in(epoch_)) close = differ(access, memory, values);
    if (access.is_store()) {
      std::memset(written, 1, bytes);
    } else if (!known) {
      report_.found(report_.counts.unwritten, "load of unwritten shared memory", at, access.lane);
    }
    const int64_t before = findings();
    for (uint64_t i = at; i < at + bytes && findings() == before; ++i) {
      shared_history_[i].note(access, report_, epoch_, true, same, close, values);
    }
    return memory;
  }

  uint8_t* global(const Access& access, const char* what) {
    const uint64_t piece = (access.address >> kPiece) - 1, bytes = access.bytes;
    if (piece >= static_cast<uint64_t>(launch_.allocation_count)) {
      report_.fail(std::string(what) + " at a wild address", access.lane);
    }
    Allocation& of = launch_.allocations[piece];
    const uint64_t at = access.address - of.address;
    if (access.address < of.address || at + bytes > of.bytes) {
      out_of_bounds("global memory " + std::to_string(piece), what, at, of.bytes, access);
    }
    count_sectors(access, of);
    uint8_t* memory = of.host + at;
    if (of.written != nullptr) {
      if (access.is_store()) {
        std::memset(of.written + at, 1, bytes);
      } else if (std::memchr(of.written + at, 0, bytes) != nullptr) {
        report_.found(report_.counts.unwritten, "load of unwritten global memory", access.address, access.lane);
      }
    }
    std::vector<History>& history = history_[piece];
    if (history.empty()) history.resize((of.bytes >> of.shift) + 2);
    const bool same = access.is_store() && std::memcmp(access.value, memory, bytes) == 0;
    const int64_t before = findings();
    for (uint64_t i = at >> of.shift; i <= (at + bytes - 1) >> of.shift && findings() == before; ++i) {
      history[i].note(access, report_, epoch_, false, same, false, "");
    }
    return memory;
  }

  // The sectors that a block loads and stores for the first time. A GPU moves them between its L2 cache and the block.
  void count_sectors(const Access& access, Allocation& of) {
    std::unordered_set<uint64_t>& seen = access.is_store() ? stored_ : loaded_;
    int64_t& count = access.is_store() ? of.stored : of.loaded;
    for (uint64_t k = access.address / kSector; k <= (access.address + access.bytes - 1) / kSector; ++k) {
      count += seen.insert(k).second;
    }
  }

  // Whether the stored numbers and those in memory differ by rounding alone; `values` shows the first two that differ.
  static bool differ(const Access& access, const uint8_t* memory, std::string& values) {
    bool close = access.element >= 4;
    for (int i = 0; i < access.bytes && close; i += access.element) {
      const bool wide = access.element == 8;
      const double was = wide ? at<double>(memory + i) : at<float>(memory + i);
      const double is = wide ? at<double>(access.value + i) : at<float>(access.value + i);
      if (std::memcmp(memory + i, access.value + i, access.element) == 0) continue;
      close = std::fabs(was - is) <= (wide ? 1e-13 : 1e-5) * std::max(std::fabs(was), std::fabs(is));
      if (values.empty()) values = ": " + text(was) + " and " + text(is);
    }
    return close;
  }
  template <class T>
  static double at(const uint8_t* from) {
    T v;
    std::memcpy(&v, from, sizeof(v));
    return v;
  }

  static std::string text(double v) {
    char out[40];
    std::snprintf(out, sizeof(out), "%.17g", v);
    return out;
  }
  int64_t findings() const { return report_.counts.races + report_.counts.conflicts + report_.counts.unordered; }
  [[noreturn]] void out_of_bounds(const std::string& where, const char* what, int64_t at, int64_t size,
                                  const Access& access) const {
    report_.fail(where + ": " + what + " out of bounds, " + std::to_string(access.bytes) + " bytes at " +
                     std::to_string(at) + " of " + std::to_string(size),
                 access.lane);
  }

  const Launch& launch_;
  Report& report_;
  uint32_t epoch_ = 0;
  std::vector<uint8_t> shared_, shared_written_;
  std::vector<History> shared_history_;
  std::vector<uint8_t> local_;
  std::vector<std::vector<History>> history_;
  std::unordered_set<uint64_t> loaded_, stored_;  // sectors of this block
};

}  // namespace ptx
