// torch's operators on the CUDA kernels. The operators have their own names, because Python chooses between this
// backend and others, and torch's dispatcher has one kernel for each operator and device.
#include "../common/bindings.h"

#include <cuda_runtime_api.h>
#include <steam/steam.h>
#include <torch/csrc/stable/accelerator.h>

#include "kernels.h"

namespace steam {
namespace {

struct Cuda {
  static Place place(const Tensor& x) { return {aoti_torch_device_type_cuda(), x.get_device_index()}; }
  static void forward(const Tensor& x, const ForwardArgs& given) {
    call(x, given, cuda::forward_workspace_bytes, cuda::forward);
  }
  static void backward(const Tensor& x, const BackwardArgs& given) {
    call(x, given, cuda::backward_workspace_bytes, cuda::backward);
  }

  template <class Args, class Given>
  static void call(const Tensor& x, const Given& given, size_t (*workspace_bytes)(const Problem&),
                   std::string (*kernels)(const Args&, void*)) {
    STD_TORCH_CHECK(x.is_cuda(), "steam_kernels: the CUDA operators take tensors on a GPU");
    const int32_t device = x.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    // The guard sets the device of torch's CUDA runtime. This library has its own copy of the runtime.
    const cudaError_t error = cudaSetDevice(device);
    STD_TORCH_CHECK(error == cudaSuccess, "steam_kernels: ", cudaGetErrorString(error));
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    // The workspace is freed before the kernels end. That is safe: torch's allocator gives its memory only to work that
    // is queued later on the same stream.
    const Tensor workspace =
        place(x).empty<1>({static_cast<int64_t>(workspace_bytes(given.problem))}, {1}, ScalarType::Byte);
    const std::string reason = kernels(Args{given, workspace.mutable_data_ptr()}, stream);
    STD_TORCH_CHECK(reason.empty(), "steam_kernels: ", reason);
  }
};

}  // namespace
}  // namespace steam

extern "C" STEAM_API int steam_cuda_operators(void) { return steam::kOperators; }

STABLE_TORCH_LIBRARY_IMPL(steam_kernels, CUDA, m) { steam::Operators<steam::Cuda>::add_to(m, "cuda_"); }
