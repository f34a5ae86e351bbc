// Where the executor is, and what it has found.
#pragma once

#include <cinttypes>
#include <cstdio>
#include <set>
#include <string>
#include <utility>

#include "program.h"

namespace ptx {

struct Place {
  int block = 0, warp = 0;
  const Instruction* instruction = nullptr;
};

class Report {
 public:
  Counts counts{};
  Place place;
  std::string notes;

  // Counts a finding. Each kind is noted once for each instruction.
  void found(int64_t& count, const char* what, uint64_t address, int lane, const std::string& more = "") {
    ++count;
    if (!noted_.insert({what, line()}).second || noted_.size() > 24) return;
    char address_text[32];
    std::snprintf(address_text, sizeof(address_text), "%#" PRIx64, address);
    notes += std::string(what) + " at " + address_text + more + where(lane) + "\n";
  }
  [[noreturn]] void fail(const std::string& what, int lane) const { throw Fault(what + where(lane)); }

 private:
  int line() const { return place.instruction == nullptr ? -1 : place.instruction->line; }
  std::string where(int lane) const {
    return " (block " + std::to_string(place.block) + ", warp " + std::to_string(place.warp) + ", lane " +
           std::to_string(lane) + ", line " + std::to_string(line()) + ")";
  }

  std::set<std::pair<std::string, int>> noted_;
};

}  // namespace ptx
