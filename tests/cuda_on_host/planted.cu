// Kernels with one mistake each, which the stand-in and the sanitizers must catch; `planted 0` has none.
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
};

// Each block reverses its part of x and adds the sum of each warp's numbers.
__global__ void planted(Mistake mistake, const float* x, float* y, int count) {
  SharedMemory shared;
  float* room = shared.take<float>(mistake == kTooMuchShared ? kThreads + 4 : kThreads);
  const int t = static_cast<int>(threadIdx.x), first = static_cast<int>(blockIdx.x) * kThreads, i = first + t;
  room[mistake == kSharedOverrun ? t + 1 : t] = x[mistake == kGlobalOverrun ? i + 1 : i];
  if (mistake == kDivergentBarrier) {
    if (t < 40) __syncthreads();
  } else if (mistake != kMissingBarrier) {
    __syncthreads();
  }
  float v = room[kThreads - 1 - t];
  if (mistake == kBadMask) {
    v += __shfl_xor_sync(0x0000ffffu, v, 1);
  } else if (mistake != kDivergentShuffle || t % 32 < 31) {
    v += __shfl_xor_sync(0xffffffffu, v, 1);
  }
  if (mistake == kMisalignedPack && t == 0) v += steam::load_pack<4>(x + first + 1).at[0];
  if (mistake == kUnwrittenOutput && i == count - 1) return;
  y[mistake == kRaceOfBlocks ? t : i] = v;
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
  STEAM_LAUNCH(planted, kBlocks, kThreads, sizeof(float) * kThreads, nullptr, mistake, x.get(), y.get(), kCount);
  for (int i = 0; i < kCount; ++i) {
    const int first = i / kThreads * kThreads, reversed = first + kThreads - 1 - (i - first);
    const float expected = static_cast<float>(reversed + (reversed ^ 1));
    if (y[i] != expected) {
      std::printf("y[%d] is %g, expected %g\n", i, static_cast<double>(y[i]), static_cast<double>(expected));
      return 1;
    }
  }
  return 0;
}
