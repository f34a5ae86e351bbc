// Arithmetic of sizes, for host and device code.
#pragma once

#include "problem.h"

namespace steam {
namespace {

template <class I>
STEAM_CONSTEXPR I smaller(I a, I b) {
  return a < b ? a : b;
}
template <class I>
STEAM_CONSTEXPR I larger(I a, I b) {
  return a < b ? b : a;
}

}  // namespace
}  // namespace steam
