// The CPU kernels' interface: plain arguments, one entry for each instruction set and direction. No torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/problem.h"

namespace steam {
namespace cpu {

// Runs body(context, task) for every task in [0, tasks), each once, on any threads, and returns when all are done.
using ParallelRun = void (*)(int64_t tasks, void (*body)(void* context, int64_t task), void* context);

struct Parallel {
  int64_t threads;
  ParallelRun run;  // may be null where threads is 1
};

// All maps are dense in the problem's memory order. `saved` is (N, 2 * (C + gh * gw)) in the accumulation type: a
// sample's row holds channel tokens, channel pre-activations, spatial tokens, spatial pre-activations.
struct ForwardArgs {
  Problem problem;
  Weight channel_weight;
  Weight spatial_weight;
  const void* x;
  const void* residual;  // may be null
  void* y;               // may be x itself
  void* saved;           // may be null
  Parallel parallel;
};

struct BackwardArgs {
  Problem problem;
  Weight channel_weight;
  Weight spatial_weight;
  const void* dy;
  const void* x;
  const void* y;  // read where problem.relu
  const void* saved;
  void* dx;         // null: not asked for
  void* dresidual;  // null: not asked for
  WeightGrad channel_grad;
  WeightGrad spatial_grad;
  Parallel parallel;
};

// Bytes of the last-level cache that a call may hope to find its maps in. Decides how outputs are stored, never what
// they hold.
int64_t cache_bytes();

// An entry of the instruction set that is being compiled.
#define STEAM_JOIN(a, b) a##b
#define STEAM_NAME(prefix, variant) STEAM_JOIN(prefix, variant)

// Bytes of working memory that the call needs. It runs where `memory` is not null, and nothing fails then.
using Forward = std::size_t (*)(const ForwardArgs&, char* memory);
using Backward = std::size_t (*)(const BackwardArgs&, char* memory);

// The variant in use: the best that the processor has, until another is selected. Bytes of working memory that there
// were not, in which case nothing has run; 0 where the call is done.
std::size_t forward(const ForwardArgs& args);
std::size_t backward(const BackwardArgs& args);

// What to say then, in STEAM_MESSAGE_BYTES.
void no_memory(std::size_t bytes, const Problem& problem, char* text);

}  // namespace cpu
}  // namespace steam
