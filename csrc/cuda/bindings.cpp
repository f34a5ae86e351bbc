// The operators' CUDA kernels. They have names of their own, since a key of the dispatcher has room for one
// registration, and Python chooses between this backend and others.
#include "../common/bindings.h"

#include <cuda_runtime_api.h>
#include <steam/steam.h>
#include <torch/csrc/stable/accelerator.h>

#include "kernels.h"

namespace steam {
namespace {

struct Cuda {
  using ForwardArgs = cuda::ForwardArgs;
  using BackwardArgs = cuda::BackwardArgs;

  static Place place(const Tensor& x) { return {aoti_torch_device_type_cuda(), x.get_device_index()}; }
  static void forward(const Tensor& x, const ForwardArgs& args) {
    run(x, args, cuda::forward_workspace_bytes, cuda::forward);
  }
  static void backward(const Tensor& x, const BackwardArgs& args) {
    run(x, args, cuda::backward_workspace_bytes, cuda::backward);
  }

  template <class Args>
  static void run(const Tensor& x, Args args, size_t (*workspace_bytes)(const Problem&),
                  std::string (*kernels)(const Args&, void*)) {
    STD_TORCH_CHECK(x.is_cuda(), "steam_kernels: the CUDA operators take tensors on a GPU");
    const int32_t device = x.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    // The guard tells torch's copy of the runtime; this library has its own.
    const cudaError_t error = cudaSetDevice(device);
    STD_TORCH_CHECK(error == cudaSuccess, "steam_kernels: ", cudaGetErrorString(error));
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    // Torch gives the block away only to what is queued on this stream later.
    const Tensor workspace =
        place(x).empty<1>({static_cast<int64_t>(workspace_bytes(args.problem))}, {1}, ScalarType::Byte);
    args.workspace = workspace.mutable_data_ptr();
    const std::string reason = kernels(args, stream);
    STD_TORCH_CHECK(reason.empty(), "steam_kernels: ", reason);
  }
};

}  // namespace
}  // namespace steam

extern "C" STEAM_API int steam_cuda_operators(void) { return steam::kOperators; }

STABLE_TORCH_LIBRARY_IMPL(steam_kernels, CUDA, m) {
  using Ops = steam::Operators<steam::Cuda>;
  m.impl("cuda_forward", &Ops::forward);
  m.impl("cuda_forward_", &Ops::forward_);
  m.impl("cuda_backward", &Ops::backward);
}
