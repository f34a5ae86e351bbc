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

template <class Args>
steam_status run(std::size_t (*kernels)(const Args&), const Args& args, const steam::Report& report) {
  const std::size_t lacked = kernels(args);
  if (lacked == 0) return STEAM_OK;
  char text[STEAM_MESSAGE_BYTES];
  steam::cpu::no_memory(lacked, args.problem, text);
  return report.fail(STEAM_OUT_OF_MEMORY, "%s", text);
}

}  // namespace

steam_status steam_cpu_forward(const steam_forward_args* args, const steam_parallel* parallel, char* message) {
  const steam::Report report(message);
  steam::cpu::Parallel threads;
  STEAM_TRY(steam::check(args, report));
  STEAM_TRY(parallel_of(parallel, report, threads));
  const steam::DType weight = steam::dtype_of(args->problem.weight_dtype);
  const steam::cpu::ForwardArgs call{steam::problem_of(args->problem),
                                     {args->channel_weight, weight},
                                     {args->spatial_weight, weight},
                                     args->x,
                                     args->residual,
                                     args->y,
                                     args->saved,
                                     threads};
  return run(steam::cpu::forward, call, report);
}

steam_status steam_cpu_backward(const steam_backward_args* args, const steam_parallel* parallel, char* message) {
  const steam::Report report(message);
  steam::cpu::Parallel threads;
  STEAM_TRY(steam::check(args, report));
  STEAM_TRY(parallel_of(parallel, report, threads));
  const steam::DType weight = steam::dtype_of(args->problem.weight_dtype);
  const steam::cpu::BackwardArgs call{steam::problem_of(args->problem),
                                      {args->channel_weight, weight},
                                      {args->spatial_weight, weight},
                                      args->dy,
                                      args->x,
                                      args->y,
                                      args->saved,
                                      args->dx,
                                      args->dresidual,
                                      {args->channel_grad, weight},
                                      {args->spatial_grad, weight},
                                      threads};
  return run(steam::cpu::backward, call, report);
}
