// The C functions of steam::cuda: checks, then one call of the kernels.
#include "../common/c_api.h"

#include <new>

#include "kernels.h"

namespace {

// Calls f, and returns a status for an exception, because no exception may leave a C function.
template <class F>
steam_status guarded(const steam::Report& report, const F& f) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    return report.fail(STEAM_OUT_OF_MEMORY, "the host has no memory left");
  }
}

steam_status workspace(const steam_problem* problem, int64_t* bytes, char* message,
                       size_t (*needed)(const steam::Problem&)) {
  const steam::Report report(message);
  STEAM_TRY(report.given("problem", problem));
  STEAM_TRY(report.given("bytes", bytes));
  STEAM_TRY(steam::check(*problem, report));
  return guarded(report, [&] {
    *bytes = static_cast<int64_t>(needed(steam::problem_of(*problem)));
    return STEAM_OK;
  });
}

template <class Args, class Given>
steam_status call(const Given* args, void* workspace, void* stream, char* message,
                  size_t (*needed)(const steam::Problem&), std::string (*kernels)(const Args&, void*)) {
  const steam::Report report(message);
  STEAM_TRY(steam::check(args, report));
  return guarded(report, [&] {
    const Args whole{steam::args_of(*args), workspace};
    if (needed(whole.problem) > 0) STEAM_TRY(report.given("workspace", workspace));
    const std::string reason = kernels(whole, stream);
    return reason.empty() ? STEAM_OK : report.fail(STEAM_CUDA_ERROR, "%s", reason.c_str());
  });
}

}  // namespace

steam_status steam_cuda_forward_workspace(const steam_problem* problem, int64_t* bytes, char* message) {
  return workspace(problem, bytes, message, steam::cuda::forward_workspace_bytes);
}

steam_status steam_cuda_backward_workspace(const steam_problem* problem, int64_t* bytes, char* message) {
  return workspace(problem, bytes, message, steam::cuda::backward_workspace_bytes);
}

steam_status steam_cuda_forward(const steam_forward_args* args, void* workspace, void* stream, char* message) {
  return call(args, workspace, stream, message, steam::cuda::forward_workspace_bytes, steam::cuda::forward);
}

steam_status steam_cuda_backward(const steam_backward_args* args, void* workspace, void* stream, char* message) {
  return call(args, workspace, stream, message, steam::cuda::backward_workspace_bytes, steam::cuda::backward);
}
