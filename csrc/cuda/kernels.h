// The CUDA kernels' interface: plain arguments, one entry for each direction. No torch, and nothing of CUDA's headers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../common/problem.h"

namespace steam {
namespace cuda {

// All maps and weights lie in memory of the current device, maps dense in the problem's memory order. `saved` is
// (N, 2 * (C + gh * gw)) in the accumulation type: a sample's row holds channel tokens, channel pre-activations,
// spatial tokens, spatial pre-activations.
struct ForwardArgs {
  Problem problem;
  Weight channel_weight;
  Weight spatial_weight;
  const void* x;
  const void* residual;  // may be null
  void* y;               // may be x itself
  void* saved;           // may be null
  void* workspace;       // forward_workspace_bytes, aligned to 16; may be null where that is 0
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
  void* dresidual;  // null: not asked for; only where problem.relu
  WeightGrad channel_grad;
  WeightGrad spatial_grad;
  void* workspace;  // backward_workspace_bytes, aligned to 16; may be null where that is 0
};

// Bytes of device memory that a call needs beside its arguments, on the current device. What it holds before the call
// is of no account; it must live until the stream has passed the call.
size_t forward_workspace_bytes(const Problem& problem);
size_t backward_workspace_bytes(const Problem& problem);

// Queue the call on `stream` (a cudaStream_t) of the current device and return without waiting. Empty where every
// launch was accepted, else a sentence with the kernel, the shape and CUDA's reason.
std::string forward(const ForwardArgs& args, void* stream);
std::string backward(const BackwardArgs& args, void* stream);

}  // namespace cuda
}  // namespace steam
