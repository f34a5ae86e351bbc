// The interface of the CUDA kernels, without torch and without CUDA's headers: plain structs, and one entry for each
// direction.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../common/problem.h"

namespace steam {
namespace cuda {

// All pointers are to memory of the current device. `workspace` is aligned to 16 bytes and has the bytes that
// forward_workspace_bytes or backward_workspace_bytes returns. It may be null if that is 0.
struct ForwardArgs : steam::ForwardArgs {
  void* workspace;
};

struct BackwardArgs : steam::BackwardArgs {
  void* workspace;
};

// Returns the bytes of workspace that a call needs on the current device. The call ignores the content of the
// workspace. The workspace must stay allocated until the stream has run all kernels of the call.
size_t forward_workspace_bytes(const Problem& problem);
size_t backward_workspace_bytes(const Problem& problem);

// Queues the kernels of a call on `stream`, a cudaStream_t of the current device, and does not wait for them. Returns
// an empty string if CUDA accepted every launch, else a sentence with the kernel, the shape and CUDA's reason.
std::string forward(const ForwardArgs& args, void* stream);
std::string backward(const BackwardArgs& args, void* stream);

}  // namespace cuda
}  // namespace steam
