// The interface of the CPU kernels, without torch: plain structs, and one entry for each variant and direction.
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
  ParallelRun run;  // may be null if threads is 1
};

struct ForwardArgs : steam::ForwardArgs {
  Parallel parallel;
};

struct BackwardArgs : steam::BackwardArgs {
  Parallel parallel;
};

// How a call stores its outputs. This decides its time, never a value.
struct Stores {
  int64_t streams_above;  // outputs of more bytes are written past the caches
  bool claims;            // all others: whether a loop asks for the lines that it writes soon
};
Stores stores_of(int64_t threads);

// The name of an entry of the variant that is being compiled.
#define STEAM_JOIN(a, b) a##b
#define STEAM_NAME(prefix, variant) STEAM_JOIN(prefix, variant)

// Returns the bytes of working memory that the call needs. If `memory` is not null, the call also runs, and cannot
// fail.
using Forward = std::size_t (*)(const ForwardArgs&, char* memory);
using Backward = std::size_t (*)(const BackwardArgs&, char* memory);

// Whether the processor can run a variant of this library. A library may have been built for another processor alone.
bool usable();
constexpr char kUnusable[] = "this library was built for another processor, and has no variant that this one can run";

// A call on the variant in use: the best that the processor can run, until another is selected. Returns 0 after the
// call, or, if no working memory could be allocated, the bytes of it; then no kernel has run. The library must be
// usable.
std::size_t forward(const ForwardArgs& args);
std::size_t backward(const BackwardArgs& args);

// Writes the message for that case, of at most STEAM_MESSAGE_BYTES.
void no_memory(std::size_t bytes, const Problem& problem, char* text);

}  // namespace cpu
}  // namespace steam
