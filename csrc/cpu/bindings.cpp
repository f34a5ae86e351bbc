// torch's operators on the CPU kernels.
#include "../common/bindings.h"

#include <steam/steam.h>

#include "kernels.h"

namespace steam {
namespace {

void run_tasks(int64_t tasks, void (*body)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) body(context, t);
  });
}

struct Cpu {
  static Place place(const Tensor&) { return {aoti_torch_device_type_cpu(), 0}; }
  static void forward(const Tensor&, const ForwardArgs& given) { run(cpu::forward, given); }
  static void backward(const Tensor&, const BackwardArgs& given) { run(cpu::backward, given); }

  template <class Args, class Given>
  static void run(std::size_t (*kernels)(const Args&), const Given& given) {
    STD_TORCH_CHECK(cpu::usable(), "steam_kernels: ", cpu::kUnusable);
    const Args args{given, {static_cast<int64_t>(torch::stable::get_num_threads()), run_tasks}};
    const std::size_t lacked = kernels(args);
    if (lacked == 0) return;
    char text[STEAM_MESSAGE_BYTES];
    cpu::no_memory(lacked, args.problem, text);
    STD_TORCH_CHECK(false, "steam_kernels: ", static_cast<const char*>(text));
  }
};

}  // namespace
}  // namespace steam

extern "C" STEAM_API int steam_cpu_operators(void) { return steam::kOperators; }

STABLE_TORCH_LIBRARY_IMPL(steam_kernels, CPU, m) { steam::Operators<steam::Cpu>::add_to(m, ""); }
