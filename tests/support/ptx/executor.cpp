// Executes a decoded kernel, one instruction of one warp at a time. Each lane has its own program counter. Between two
// barriers the warps of a block run in a random order.
#include <algorithm>
#include <cstring>
#include <exception>
#include <random>

#include "arithmetic.h"
#include "memory.h"

namespace ptx {
namespace {

// A bit for each lane.
using Lanes = uint32_t;
constexpr Lanes kAll = 0xFFFFFFFFu;

template <class F>
void for_lanes(Lanes lanes, const F& f) {
  for (; lanes != 0; lanes &= lanes - 1) f(std::countr_zero(lanes));
}

struct Warp {
  Registers registers;
  uint32_t counter[32];
  Lanes present = 0, exited = 0, at_barrier = 0, waiting = 0;
  uint32_t step = 1;
  // Rounds of loads from beyond the L1 cache, one after the other: before each register has its number, before the
  // current stretch of code without branches and barriers, and before all sources of this stretch.
  std::vector<int32_t> rounds;
  int32_t begun = 0, needed = 0;
  bool together = true;  // whether all lanes that can run have one program counter

  Lanes alive() const { return present & ~exited; }
  Lanes ready() const { return alive() & ~at_barrier & ~waiting; }
};

class Executor {
 public:
  Executor(const Launch& launch, Report& report)
      : launch_(launch),
        report_(report),
        threads_(launch.block[0] * launch.block[1] * launch.block[2]),
        warps_((threads_ + 31) / 32),
        memory_(launch, static_cast<int>(warps_.size()), report),
        arithmetic_(launch.register_bits, report),
        random_(launch.seed) {
    for (Warp& warp : warps_) {
      warp.registers.values.assign(static_cast<size_t>(launch.registers) * 32, ~0ull);
      warp.rounds.resize(launch.registers);
      for (int k = 0; k < launch.constants; ++k) {
        std::fill_n(warp.registers[launch.constant_slots[k]], 32, launch.constant_values[k]);
      }
    }
  }

  void run() {
    for (int k = 0; k < launch_.block_count; ++k) run_block(launch_.blocks[k]);
  }

 private:
  // ---- blocks

  void run_block(int block) {
    report_.place = {block, 0, nullptr};
    memory_.begin_block();
    for (size_t k = 0; k < warps_.size(); ++k) begin(warps_[k], static_cast<int>(k), block);
    const int schedule = static_cast<int>(random_() % 3);
    do {
      run_to_barrier(schedule);
    } while (!pass_barrier());
    for (const Warp& warp : warps_) {
      report_.counts.rounds = std::max<int64_t>(report_.counts.rounds, std::max(warp.begun, warp.needed));
    }
  }

  void begin(Warp& warp, int index, int block) {
    const int lanes = std::min(32, threads_ - 32 * index);
    warp.present = lanes == 32 ? kAll : (1u << lanes) - 1;
    warp.exited = warp.at_barrier = warp.waiting = 0;
    warp.together = true;
    ++warp.step;
    std::fill(warp.rounds.begin(), warp.rounds.end(), 0);
    warp.begun = warp.needed = 0;
    std::fill_n(warp.counter, 32, 0);
    const int32_t *grid = launch_.grid, *size = launch_.block;
    for (int k = 0; k < launch_.specials; ++k) {
      uint64_t* out = warp.registers[launch_.special_slots[k]];
      for (int lane = 0; lane < 32; ++lane) {
        const int thread = 32 * index + lane;
        const int values[] = {thread % size[0],
                              thread / size[0] % size[1],
                              thread / size[0] / size[1],
                              block % grid[0],
                              block / grid[0] % grid[1],
                              block / grid[0] / grid[1],
                              size[0],
                              size[1],
                              size[2],
                              grid[0],
                              grid[1],
                              grid[2],
                              lane,
                              launch_.dynamic_shared};
        out[lane] = values[launch_.special_names[k]];
      }
    }
  }

  // Runs every warp to its end or to a barrier: in turns of one instruction, in turns of random length, or one by one.
  void run_to_barrier(int schedule) {
    std::vector<int> order(warps_.size());
    for (size_t k = 0; k < order.size(); ++k) order[k] = static_cast<int>(k);
    bool any = true;
    while (any) {
      any = false;
      std::shuffle(order.begin(), order.end(), random_);
      for (const int warp : order) {
        int turn = schedule == 0 ? 1 : schedule == 1 ? 1 + static_cast<int>(random_() % 64) : INT32_MAX;
        while (turn-- > 0 && step(warp)) any = true;
      }
    }
  }

  // True if the block is done.
  bool pass_barrier() {
    const Instruction* reached = nullptr;
    for (const Warp& warp : warps_) {
      if ((warp.alive() & ~warp.at_barrier) != 0) fail("lanes wait for each other for ever");
      uint32_t first = 0;
      for_lanes(warp.alive(), [&](int lane) { first = warp.counter[lane]; });
      for_lanes(warp.alive(), [&](int lane) {
        if (warp.counter[lane] != first) fail("lanes of a warp are at different barriers");
      });
      if (warp.alive() == 0) continue;
      const Instruction* barrier = &launch_.code[first - 1];
      if (reached != nullptr && reached->immediate != barrier->immediate) {
        fail("warps are at barriers of different numbers");
      }
      reached = barrier;
    }
    if (reached == nullptr) return true;
    int32_t begun = 0;
    for (const Warp& warp : warps_) begun = std::max({begun, warp.begun, warp.needed});
    for (Warp& warp : warps_) {
      warp.begun = begun;
      warp.at_barrier = 0;
      warp.together = false;
      ++warp.step;
    }
    memory_.barrier();
    ++report_.counts.barriers;
    return false;
  }

  // ---- instructions

  // One instruction of the lanes of a warp that come first in the code; false if no lane can run.
  bool step(int index) {
    Warp& warp = warps_[index];
    Lanes lanes = 0;
    const uint32_t counter = next_lanes(warp, lanes);
    if (lanes == 0) return false;
    report_.place.warp = index;
    if (counter >= static_cast<uint32_t>(launch_.code_length)) {
      warp.exited |= lanes;
      return true;
    }
    const Instruction& i = launch_.code[counter];
    report_.place.instruction = &i;
    const bool meets = i.op == kOp_shfl || i.op == kOp_bar_warp;
    if (meets) {  // lanes that wait here already take part
      for_lanes(warp.waiting, [&](int lane) {
        if (warp.counter[lane] == counter) lanes |= 1u << lane;
      });
    }
    Lanes active = lanes;
    if (i.predicate >= 0) {
      const uint64_t* predicate = warp.registers[i.predicate];
      for_lanes(lanes, [&](int lane) {
        if ((predicate[lane] & 1) == static_cast<uint64_t>(i.negated)) active &= ~(1u << lane);
      });
    }
    if (meets && active != 0) {
      const Lanes complete = complete_lanes(warp, i, active);
      const Lanes rest = active & ~complete;
      warp.waiting = (warp.waiting & ~active) | rest;
      if (rest != 0) warp.together = false;
      lanes &= ~rest;
      active = complete;
      if (lanes == 0) {
        if (warp.ready() == 0) fail("lanes wait for others of their mask for ever");
        return true;
      }
    }
    ++report_.counts.instructions;
    launch_.executed[counter] += std::popcount(active);
    count_rounds(warp, i, active);
    if (i.op == kOp_bra) {
      for_lanes(lanes, [&](int lane) { warp.counter[lane] = active >> lane & 1 ? i.target : counter + 1; });
      if (active != 0 && active != lanes) warp.together = false;
      return true;
    }
    for_lanes(lanes, [&](int lane) { warp.counter[lane] = counter + 1; });
    if (active != 0) execute(warp, i, active);
    if (active != lanes && (i.op == kOp_ret || i.op == kOp_bar)) warp.together = false;
    return true;
  }

  // A load begins when its address is known and the stretch of code has begun: a compiler moves loads within a stretch,
  // and not across branches and barriers. A stretch ends when all numbers are there that it has used.
  void count_rounds(Warp& warp, const Instruction& i, Lanes active) const {
    int32_t from = warp.begun;
    for (int k = 0; k < i.sources; ++k) from = std::max(from, warp.rounds[i.s[k]]);
    if (i.predicate >= 0) from = std::max(from, warp.rounds[i.predicate]);
    warp.needed = std::max(warp.needed, from);
    if (i.op == kOp_bra) warp.begun = warp.needed;
    const bool is_far = i.op == kOp_ld && loads_from_afar(warp, i, active);
    for (int k = 0; k < i.results; ++k) {
      if (i.d[k] >= 0) warp.rounds[i.d[k]] = from + is_far;
    }
  }
  bool loads_from_afar(Warp& warp, const Instruction& i, Lanes active) const {
    const uint64_t* base = warp.registers[i.s[0]];
    bool found = false;
    for_lanes(active, [&](int lane) {
      const uint64_t address = base[lane] + static_cast<uint64_t>(i.immediate);
      found = found ||
              (Memory::space_of(address, i.space) == kSpace_global && !memory_.has_loaded(address, i.width * i.count));
    });
    return found;
  }

  static uint32_t next_lanes(Warp& warp, Lanes& lanes) {
    const Lanes ready = warp.ready();
    if (ready == 0) return 0;
    if (warp.together) {
      lanes = ready;
      return warp.counter[std::countr_zero(ready)];
    }
    uint32_t first = UINT32_MAX;
    for_lanes(ready, [&](int lane) { first = std::min(first, warp.counter[lane]); });
    for_lanes(ready, [&](int lane) {
      if (warp.counter[lane] == first) lanes |= 1u << lane;
    });
    warp.together = lanes == warp.alive();
    return first;
  }

  // Lanes at a shuffle or a barrier of the warp of which every lane that their masks name has come.
  Lanes complete_lanes(Warp& warp, const Instruction& i, Lanes active) const {
    const uint64_t* mask = warp.registers[i.s[i.sources - 1]];
    Lanes complete = 0;
    for_lanes(active, [&](int lane) {
      Lanes named = static_cast<Lanes>(mask[lane]);
      if ((named >> lane & 1) == 0) report_.fail("a lane is outside of its own mask", lane);
      named &= warp.present;
      if ((named & warp.exited) != 0) report_.fail("a mask names a lane that has exited", lane);
      if ((named & ~active) == 0) complete |= 1u << lane;
    });
    return complete;
  }

  void execute(Warp& warp, const Instruction& i, Lanes active) {
    switch (i.op) {
      case kOp_ret: warp.exited |= active; return;
      case kOp_bar: warp.at_barrier |= active; return;
      case kOp_bar_warp: ++warp.step; return;
      case kOp_shfl: shuffle(warp, i, active); return;
      case kOp_ld: load(warp, i, active); return;
      case kOp_st: store(warp, i, active); return;
      case kOp_ldmatrix:
      case kOp_stmatrix: matrices(warp, i, active); return;
      case kOp_fence: return;
      case kOp_trap: report_.fail("trap", std::countr_zero(active));
      default: arithmetic_.run(i, warp.registers, active);
    }
  }

  // The sources are the number, the lane or its distance, the bounds of a segment, and the mask.
  void shuffle(Warp& warp, const Instruction& i, Lanes active) {
    Registers& r = warp.registers;
    uint64_t from[32];
    std::memcpy(from, r[i.s[0]], sizeof(from));
    const uint64_t *distances = r[i.s[1]], *segments = r[i.s[2]], *masks = r[i.s[3]];
    uint64_t sources[32];
    for_lanes(active, [&](int lane) {
      const int distance = distances[lane] & 31, clamp = segments[lane] & 31, segment = segments[lane] >> 8 & 31;
      const int end = (lane & segment) | (clamp & ~segment), begin = lane & segment;
      int source = 0;
      switch (i.other) {
        case kShuffle_up: source = lane - distance; break;
        case kShuffle_down: source = lane + distance; break;
        case kShuffle_bfly: source = lane ^ distance; break;
        default: source = begin | (distance & ~segment);
      }
      const bool inside = i.other == kShuffle_up ? source >= end : source <= end;
      sources[lane] = (inside ? source : lane) | (inside ? 32 : 0);
    });
    for_lanes(active, [&](int lane) {
      const int source = sources[lane] & 31;
      if ((active >> source & 1) == 0 || (masks[lane] >> source & 1) == 0) {
        report_.fail("a shuffle from a lane that does not take part", lane);
      }
    });
    for_lanes(active, [&](int lane) {
      if (i.d[0] >= 0) r[i.d[0]][lane] = low(from[sources[lane] & 31], 32);
      if (i.results > 1 && i.d[1] >= 0) r[i.d[1]][lane] = sources[lane] >> 5;
    });
  }

  // ---- memory

  void addresses(Warp& warp, const Instruction& i, Lanes active, uint64_t* out) {
    const uint64_t* base = warp.registers[i.s[0]];
    for_lanes(active, [&](int lane) {
      out[lane] = base[lane] + static_cast<uint64_t>(i.immediate);
      if (i.space == kSpace_shared) out[lane] = low(out[lane], 32);
    });
  }
  static Access access(const Warp& warp, const Instruction& i, uint64_t address, int lane, const uint8_t* value) {
    return {address, i.width * i.count, i.width, lane, warp.step, value};
  }

  void load(Warp& warp, const Instruction& i, Lanes active) {
    uint64_t at[32];
    addresses(warp, i, active, at);
    for_lanes(active, [&](int lane) {
      uint8_t values[64];
      memory_.load(access(warp, i, at[lane], lane, nullptr), i.space, values);
      for (int k = 0; k < i.count; ++k) {
        uint64_t v = 0;
        std::memcpy(&v, values + k * i.width, i.width);
        arithmetic_.put(i, warp.registers, k, lane, v, i.type);
      }
    });
  }

  void store(Warp& warp, const Instruction& i, Lanes active) {
    uint64_t at[32];
    uint8_t values[32][64];
    addresses(warp, i, active, at);
    for_lanes(active, [&](int lane) {
      for (int k = 0; k < i.count; ++k) {
        std::memcpy(values[lane] + k * i.width, &warp.registers[i.s[1 + k]][lane], i.width);
      }
    });
    Lanes lost = 0;
    if (Memory::space_of(at[std::countr_zero(active)], i.space) != kSpace_local) {
      lost = replaced(active, at, values[0], sizeof(values[0]), i.width * i.count);
    }
    for_lanes(active & ~lost, [&](int lane) { memory_.store(access(warp, i, at[lane], lane, values[lane]), i.space); });
  }

  // PTX leaves open which of several lanes stores to one address last. Returns the lanes whose numbers do not stay.
  Lanes replaced(Lanes active, const uint64_t* at, const uint8_t* values, size_t stride, size_t bytes) {
    std::pair<uint64_t, int> sorted[32];
    int count = 0;
    for_lanes(active, [&](int lane) { sorted[count++] = {at[lane], lane}; });
    std::sort(sorted, sorted + count);
    Lanes lost = 0;
    for (int k = 1; k < count; ++k) {
      const auto [address, lane] = sorted[k];
      const auto [other_address, other] = sorted[k - 1];
      if (address != other_address) continue;
      lost |= 1u << (launch_.first_wins ? lane : other);
      if (std::memcmp(values + stride * lane, values + stride * other, bytes) != 0) {
        report_.found(report_.counts.conflicts, "two lanes store different numbers to one address", address, lane);
      }
    }
    return lost;
  }

  // Matrices of 8 x 8 numbers of 16 bits. Lane 8 k + j has the address of row j of matrix k; a lane's registers hold
  // two neighbours of row lane / 4, or of column lane / 4 with .trans.
  void matrices(Warp& warp, const Instruction& i, Lanes active) {
    if (active != kAll) fail("ldmatrix or stmatrix by a part of a warp");
    Registers& r = warp.registers;
    uint64_t at[32];
    addresses(warp, i, active, at);
    uint16_t rows[32][8];
    const bool stores = i.op == kOp_stmatrix;
    const auto element = [&](int matrix, int lane, int half) -> uint16_t& {
      const int pair = lane % 4 * 2 + half;
      return i.flags & kFlag_trans ? rows[8 * matrix + pair][lane / 4] : rows[8 * matrix + lane / 4][pair];
    };
    const auto row = [&](int lane, const uint8_t* value) { return Access{at[lane], 16, 2, lane, warp.step, value}; };
    if (!stores) {
      for (int lane = 0; lane < 8 * i.count; ++lane) memory_.load(row(lane, nullptr), kSpace_shared, rows[lane]);
    }
    for (int matrix = 0; matrix < i.count; ++matrix) {
      for (int lane = 0; lane < 32; ++lane) {
        if (stores) {
          const uint64_t v = r[i.s[1 + matrix]][lane];
          for (int half = 0; half < 2; ++half) element(matrix, lane, half) = static_cast<uint16_t>(v >> (16 * half));
        } else {
          r[i.d[matrix]][lane] = element(matrix, lane, 0) | static_cast<uint32_t>(element(matrix, lane, 1)) << 16;
        }
      }
    }
    if (!stores) return;
    const Lanes with_row = i.count == 4 ? kAll : (1u << 8 * i.count) - 1;
    const uint8_t* values = reinterpret_cast<const uint8_t*>(rows);
    const Lanes lost = replaced(with_row, at, values, sizeof(rows[0]), sizeof(rows[0]));
    for_lanes(with_row & ~lost,
              [&](int lane) { memory_.store(row(lane, values + sizeof(rows[0]) * lane), kSpace_shared); });
  }

  [[noreturn]] void fail(const char* what) const { report_.fail(what, -1); }

  const Launch& launch_;
  Report& report_;
  int threads_;
  std::vector<Warp> warps_;
  Memory memory_;
  Arithmetic arithmetic_;
  std::mt19937_64 random_;
};

#define PTX_NAME(prefix, name) #name " "
const char* const kNames[] = {PTX_TYPES(PTX_NAME, ),        PTX_OPERATIONS(PTX_NAME, ),  PTX_FLAGS(PTX_NAME, ),
                              PTX_SPACES(PTX_NAME, ),       PTX_COMPARISONS(PTX_NAME, ), PTX_SHUFFLES(PTX_NAME, ),
                              PTX_COMBINATIONS(PTX_NAME, ), PTX_SPECIALS(PTX_NAME, ),    PTX_COUNTS(PTX_NAME, )};
#undef PTX_NAME

}  // namespace
}  // namespace ptx

extern "C" {

// The lists of program.h, with spaces between the names.
const char* ptx_names(int list) { return ptx::kNames[list]; }

// 0, or 1 for a kernel that could not go on. `message` then says why, and has the notes otherwise.
int ptx_run(const ptx::Launch* launch, ptx::Counts* counts, char* message, int room) {
  ptx::Report report;
  int status = 0;
  try {
    ptx::Executor(*launch, report).run();
  } catch (const std::exception& error) {
    report.notes += error.what();
    status = 1;
  }
  *counts = report.counts;
  std::snprintf(message, room, "%s", report.notes.c_str());
  return status;
}
}
