// Kernels with one mistake each, which cuda_on_host.h or a sanitizer must catch. `planted 0` has no mistake.
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "device.cuh"

namespace {

using steam::SharedMemory;

constexpr int kThreads = 64;

enum Mistake {
  kNone,
  kGlobalOverrun,
  kSharedOverrun,
  kMissingBarrier,
  kDivergentBarrier,
  kBadMask,
  kDivergentShuffle,
  kUnwrittenOutput,
  kMisalignedPack,
  kTooMuchShared,
  kRaceOfBlocks,
  kBarriersApart,
  kMaskWithoutSource,
  kTooLittleShared,
  kPiecesApart,
  kUnaskedShared,
  kBlockReadsOther,
  kOrderOfBlocks,
  kOrderOfThreads,
  kOffsetOverflow,
  kShiftTooFar,
  kConversionOutOfRange,
};

// Each block reverses its 64 numbers of x, and adds to each number its neighbour. Only the mistakes of an order write
// `chain`.
__global__ void planted(Mistake mistake, const float* x, float* y, float* chain, int count) {
  SharedMemory shared;
  const int t = static_cast<int>(threadIdx.x), first = static_cast<int>(blockIdx.x) * kThreads, i = first + t;
  const int more = mistake == kTooMuchShared ? 4 : mistake == kPiecesApart && t == kThreads - 1 ? -1 : 0;
  float* room = shared.take<float>(kThreads + more);
  room[mistake == kSharedOverrun ? t + 1 : t] = x[mistake == kGlobalOverrun ? i + 1 : i];
  if (mistake == kDivergentBarrier) {
    if (t < 40) __syncthreads();
  } else if (mistake == kBarriersApart) {
    if (t < 40) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (mistake != kMissingBarrier) {
    __syncthreads();
  }
  float v = room[kThreads - 1 - t];
  if (mistake == kBadMask) {
    v += __shfl_xor_sync(0x0000ffffu, v, 1);
  } else if (mistake == kMaskWithoutSource) {
    if (t % 2 == 0) v += __shfl_xor_sync(0x55555555u, v, 1);
  } else if (mistake != kDivergentShuffle || t % 32 < 31) {
    v += __shfl_xor_sync(0xffffffffu, v, 1);
  }
  if (mistake == kMisalignedPack && t == 0) v += steam::load_pack<4>(x + first + 1).at[0];
  if (mistake == kUnwrittenOutput && i == count - 1) return;
  y[mistake == kRaceOfBlocks ? t : i] = v;
  if (mistake == kBlockReadsOther) y[i] += y[(i + kThreads) % count];
  // Each order of the blocks or threads gives another result.
  if ((mistake == kOrderOfBlocks && t == 0) || (mistake == kOrderOfThreads && first == 0)) *chain = *chain / 2 + v;
  // The compiler does not know these numbers, so it cannot find the overflows.
  if (mistake == kOffsetOverflow) y[i] += static_cast<float>((t + 1) * (INT32_MAX / count * 4));
  if (mistake == kShiftTooFar) y[i] += static_cast<float>(1 << (count + t));
  if (mistake == kConversionOutOfRange) y[i] += static_cast<float>(static_cast<int>(v * 1e9f));
}

}  // namespace

int main(int, char** arguments) {
  const Mistake mistake = static_cast<Mistake>(std::atoi(arguments[1]));
  cuda_on_host::random_order.seed(static_cast<uint64_t>(std::atoi(arguments[2])));
  constexpr int kBlocks = 3, kCount = kBlocks * kThreads;
  const auto x = std::make_unique<float[]>(kCount), y = std::make_unique<float[]>(kCount);
  for (int i = 0; i < kCount; ++i) {
    x[i] = static_cast<float>(i);
    y[i] = NAN;
  }
  const size_t more = mistake == kTooLittleShared ? 16 : mistake == kUnaskedShared ? 48 << 10 : 0;
  float chain = 0;
  STEAM_LAUNCH(planted, kBlocks, kThreads, sizeof(float) * kThreads + more, nullptr, mistake, x.get(), y.get(), &chain,
               kCount);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
    std::printf("the launch failed: %s\n", cudaGetErrorString(error));
    return 1;
  }
  for (int i = 0; i < kCount; ++i) {
    const int first = i / kThreads * kThreads, reversed = first + kThreads - 1 - (i - first);
    const float expected = static_cast<float>(reversed + (reversed ^ 1));
    if (y[i] != expected) {
      std::printf("y[%d] is %g, expected %g\n", i, static_cast<double>(y[i]), static_cast<double>(expected));
      return 1;
    }
  }
  if (mistake == kOrderOfBlocks || mistake == kOrderOfThreads) std::printf("%a\n", static_cast<double>(chain));
  return 0;
}
