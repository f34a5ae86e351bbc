// The interface of the CUDA kernels, without torch and without CUDA's headers: plain structs, and one entry for each
// direction.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../common/problem.h"

namespace steam {
namespace cuda {

// All pointers are to memory of the current device. All maps are dense in the problem's memory format. `saved` is
// (N, 2 * (C + gh * gw)) in the accumulation type. The row of a sample holds the channel tokens, the channel
// pre-activations, the spatial tokens and the spatial pre-activations.
struct ForwardArgs {
  Problem problem;
  Weight channel_weight;
  Weight spatial_weight;
  const void* x;
  const void* residual;  // may be null
  void* y;               // may be x itself
  void* saved;           // may be null
  void* workspace;       // of forward_workspace_bytes, aligned to 16 bytes; may be null if that is 0
};

struct BackwardArgs {
  Problem problem;
  Weight channel_weight;
  Weight spatial_weight;
  const void* dy;
  const void* x;
  const void* y;  // read only if problem.relu
  const void* saved;
  void* dx;         // may be null, then it is not computed
  void* dresidual;  // may be null, then it is not computed; null without problem.relu
  WeightGrad channel_grad;
  WeightGrad spatial_grad;
  void* workspace;  // of backward_workspace_bytes, aligned to 16 bytes; may be null if that is 0
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
