// The architectures that the library has code for, and whether the current GPU can run the code.
#include <cuda_runtime.h>
#include <steam/steam.h>

#include <cstdio>

#define STEAM_TEXT(...) #__VA_ARGS__
#define STEAM_LIST_TEXT(...) STEAM_TEXT(__VA_ARGS__)

namespace {
__global__ void probe() {}
}  // namespace

const char* steam_cuda_architectures(void) { return STEAM_LIST_TEXT(__CUDA_ARCH_LIST__); }

steam_status steam_cuda_usable(char* message) {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
  if (error == cudaSuccess) return STEAM_OK;
  cudaGetLastError();  // clears the error, which would else seem to come from the next launch
  if (message == nullptr) return STEAM_CUDA_ERROR;
  int device = 0, major = 0, minor = 0;
  if (error == cudaErrorNoKernelImageForDevice && cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess) {
    std::snprintf(message, STEAM_MESSAGE_BYTES, "the GPU is of architecture %d%d0, and the library was built for %s",
                  major, minor, steam_cuda_architectures());
  } else {
    std::snprintf(message, STEAM_MESSAGE_BYTES, "%s (%s)", cudaGetErrorString(error), cudaGetErrorName(error));
  }
  return STEAM_CUDA_ERROR;
}
