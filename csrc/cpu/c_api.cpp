// The C functions of steam::cpu: checks, then one call of the kernels.
#include "../common/c_api.h"
#include "kernels.h"

namespace {

steam_status parallel_of(const steam_parallel* given, const steam::Report& report, steam::cpu::Parallel& parallel) {
  parallel = {1, nullptr};
  if (given == nullptr) return STEAM_OK;
  STEAM_TRY(report.at_least("parallel.threads", given->threads, 1));
  if (given->threads > 1 && given->run == nullptr) {
    return report.fail(STEAM_BAD_ARGUMENT, "parallel.run must not be NULL where parallel.threads is more than 1");
  }
  parallel = {given->threads, given->run};
  return STEAM_OK;
}

template <class Args, class Given>
steam_status call(const Given* args, const steam_parallel* parallel, char* message,
                  std::size_t (*kernels)(const Args&)) {
  const steam::Report report(message);
  steam::cpu::Parallel threads;
  if (!steam::cpu::usable()) return report.fail(STEAM_BAD_ARGUMENT, "%s", steam::cpu::kUnusable);
  STEAM_TRY(steam::check(args, report));
  STEAM_TRY(parallel_of(parallel, report, threads));
  const Args whole{steam::args_of(*args), threads};
  const std::size_t lacked = kernels(whole);
  if (lacked == 0) return STEAM_OK;
  char text[STEAM_MESSAGE_BYTES];
  steam::cpu::no_memory(lacked, whole.problem, text);
  return report.fail(STEAM_OUT_OF_MEMORY, "%s", text);
}

}  // namespace

steam_status steam_cpu_forward(const steam_forward_args* args, const steam_parallel* parallel, char* message) {
  return call(args, parallel, message, steam::cpu::forward);
}

steam_status steam_cpu_backward(const steam_backward_args* args, const steam_parallel* parallel, char* message) {
  return call(args, parallel, message, steam::cpu::backward);
}
