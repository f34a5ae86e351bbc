// This file replaces the kernels behind the runner. Its calls have one mistake each, which the runner or a sanitizer
// must catch. The channel radius selects the mistake: 0 has no mistake and copies x to y, and k writes into the k-th
// array that a call reads.
#include "../../csrc/cuda/kernels.h"
#include "device.cuh"

namespace steam {
namespace {

constexpr int kThreads = 64, kReadsWorkspaceUnwritten = 100, kOverrunsWorkspace = 101;

__global__ void copy(const float* x, float* y, float* workspace, float* input, int mistake, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  if (mistake != kReadsWorkspaceUnwritten || i != count - 1) {
    workspace[mistake == kOverrunsWorkspace ? i + 1 : i] = x[i];
  }
  y[i] = workspace[i];
  if (i == 0 && input != nullptr) *input += 1;
}

std::string run(const Problem& p, const void* x, void* y, void* workspace, std::initializer_list<const void*> inputs) {
  const int64_t mistake = p.channel_radius, count = p.samples * p.channels * p.height * p.width;
  const auto k = static_cast<size_t>(mistake);
  const void* input = k >= 1 && k <= inputs.size() ? inputs.begin()[k - 1] : nullptr;
  STEAM_LAUNCH(copy, static_cast<unsigned>(ceil_div(count, kThreads)), kThreads, 0, nullptr,
               static_cast<const float*>(x), static_cast<float*>(y), static_cast<float*>(workspace),
               const_cast<float*>(static_cast<const float*>(input)), static_cast<int>(mistake),
               static_cast<int>(count));
  return "";
}

size_t bytes(const Problem& p) {
  return static_cast<size_t>(p.samples * p.channels * p.height * p.width) * sizeof(float);
}

}  // namespace

namespace cuda {

size_t forward_workspace_bytes(const Problem& p) { return bytes(p); }
size_t backward_workspace_bytes(const Problem& p) { return bytes(p); }

std::string forward(const ForwardArgs& a, void*) {
  return run(a.problem, a.x, a.y, a.workspace, {a.channel_weight.data, a.spatial_weight.data, a.x, a.residual});
}
std::string backward(const BackwardArgs& a, void*) {
  return run(a.problem, a.x, a.dx, a.workspace,
             {a.channel_weight.data, a.spatial_weight.data, a.x, a.dy, a.y, a.saved});
}

}  // namespace cuda
}  // namespace steam
