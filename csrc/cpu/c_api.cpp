// The C functions of steam::cpu: checks, then one call of the kernels.
#include <new>

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

// No exception leaves a C function.
template <class F>
steam_status guarded(const steam::Report& report, const F& f) {
  try {
    f();
  } catch (const std::bad_alloc&) {
    return report.fail(STEAM_OUT_OF_MEMORY, "there is no memory for the kernels' working space");
  }
  return STEAM_OK;
}

}  // namespace

steam_status steam_cpu_forward(const steam_forward_args* args, const steam_parallel* parallel, char* message) {
  const steam::Report report(message);
  steam::cpu::Parallel run;
  STEAM_TRY(steam::check(args, report));
  STEAM_TRY(parallel_of(parallel, report, run));
  const steam::DType weight = steam::dtype_of(args->problem.weight_dtype);
  return guarded(report, [&] {
    steam::cpu::forward({steam::problem_of(args->problem),
                         {args->channel_weight, weight},
                         {args->spatial_weight, weight},
                         args->x,
                         args->residual,
                         args->y,
                         args->saved,
                         run});
  });
}

steam_status steam_cpu_backward(const steam_backward_args* args, const steam_parallel* parallel, char* message) {
  const steam::Report report(message);
  steam::cpu::Parallel run;
  STEAM_TRY(steam::check(args, report));
  STEAM_TRY(parallel_of(parallel, report, run));
  const steam::DType weight = steam::dtype_of(args->problem.weight_dtype);
  return guarded(report, [&] {
    steam::cpu::backward({steam::problem_of(args->problem),
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
                          run});
  });
}
