// The common code of the C functions of all backends: checks of arguments, and conversions to the kernels' structs.
#pragma once

#include <steam/steam.h>

#include <cinttypes>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <initializer_list>

#include "problem.h"

namespace steam {
namespace {

// A status, and the line of text that explains it.
class Report {
 public:
  explicit Report(char* message) : message_(message) {
    if (message_ != nullptr) message_[0] = '\0';
  }

  __attribute__((format(printf, 3, 4))) steam_status fail(steam_status status, const char* format, ...) const {
    if (message_ != nullptr) {
      va_list values;
      va_start(values, format);
      std::vsnprintf(message_, STEAM_MESSAGE_BYTES, format, values);
      va_end(values);
    }
    return status;
  }

  steam_status at_least(const char* name, int64_t value, int64_t least) const {
    return value >= least
               ? STEAM_OK
               : fail(STEAM_BAD_ARGUMENT, "%s must be at least %" PRId64 ", got %" PRId64, name, least, value);
  }
  steam_status flag(const char* name, int32_t value) const {
    return value == 0 || value == 1 ? STEAM_OK : fail(STEAM_BAD_ARGUMENT, "%s must be 0 or 1, got %d", name, value);
  }
  steam_status given(const char* name, const void* pointer) const {
    return pointer != nullptr ? STEAM_OK : fail(STEAM_BAD_ARGUMENT, "%s must not be NULL", name);
  }

 private:
  char* message_;
};

#define STEAM_TRY(call)                                                        \
  do {                                                                         \
    if (const steam_status status = (call); status != STEAM_OK) return status; \
  } while (0)

inline bool is_dtype(steam_dtype dtype) {
  switch (dtype) {
    case STEAM_FLOAT32:
    case STEAM_FLOAT64:
    case STEAM_FLOAT16:
    case STEAM_BFLOAT16: return true;
  }
  return false;
}

inline DType dtype_of(steam_dtype dtype) {
  switch (dtype) {
    case STEAM_FLOAT64: return DType::kFloat64;
    case STEAM_FLOAT16: return DType::kFloat16;
    case STEAM_BFLOAT16: return DType::kBFloat16;
    default: return DType::kFloat32;
  }
}

// Whether the bytes of a map fit in int64_t. Then all offsets of the kernels do too.
inline bool has_countable_bytes(const steam_problem& p) {
  int64_t bytes = 8;
  for (const int64_t size : {p.channels, p.height, p.width, p.samples}) {
    if (size != 0 && __builtin_mul_overflow(bytes, size, &bytes)) return false;
  }
  return true;
}

inline steam_status check(const steam_problem& p, const Report& report) {
  STEAM_TRY(report.at_least("samples", p.samples, 0));
  STEAM_TRY(report.at_least("channels", p.channels, 1));
  STEAM_TRY(report.at_least("height", p.height, 1));
  STEAM_TRY(report.at_least("width", p.width, 1));
  STEAM_TRY(report.at_least("grid_h", p.grid_h, 1));
  STEAM_TRY(report.at_least("grid_w", p.grid_w, 1));
  STEAM_TRY(report.at_least("channel_radius", p.channel_radius, 0));
  STEAM_TRY(report.at_least("embed_dim", p.embed_dim, 1));
  STEAM_TRY(report.at_least("num_heads", p.num_heads, 1));
  STEAM_TRY(report.flag("self_loops", p.self_loops));
  STEAM_TRY(report.flag("sequential", p.sequential));
  STEAM_TRY(report.flag("channels_last", p.channels_last));
  STEAM_TRY(report.flag("relu", p.relu));
  if (p.grid_h > p.height || p.grid_w > p.width) {
    return report.fail(STEAM_BAD_ARGUMENT,
                       "the grid must have at most a cell a pixel, got %" PRId64 " x %" PRId64 " cells on %" PRId64
                       " x %" PRId64 " pixels",
                       p.grid_h, p.grid_w, p.height, p.width);
  }
  if (p.embed_dim % p.num_heads != 0) {
    return report.fail(STEAM_BAD_ARGUMENT, "num_heads must divide embed_dim, got %d and %d", p.num_heads, p.embed_dim);
  }
  if (p.spatial_neighbors != 4 && p.spatial_neighbors != 8) {
    return report.fail(STEAM_BAD_ARGUMENT, "spatial_neighbors must be 4 or 8, got %d", p.spatial_neighbors);
  }
  if (!std::isfinite(p.scale)) return report.fail(STEAM_BAD_ARGUMENT, "scale must be finite, got %g", p.scale);
  if (!is_dtype(p.dtype)) return report.fail(STEAM_BAD_ARGUMENT, "dtype must be a steam_dtype, got %d", p.dtype);
  if (p.weight_dtype != STEAM_FLOAT32 && p.weight_dtype != p.dtype) {
    return report.fail(STEAM_BAD_ARGUMENT, "weight_dtype must be STEAM_FLOAT32 or dtype, got %d", p.weight_dtype);
  }
  if (!has_countable_bytes(p)) return report.fail(STEAM_BAD_ARGUMENT, "the map has more than 2^63 bytes");
  return STEAM_OK;
}

inline steam_status check(const steam_forward_args* args, const Report& report) {
  STEAM_TRY(report.given("args", args));
  STEAM_TRY(check(args->problem, report));
  STEAM_TRY(report.given("channel_weight", args->channel_weight));
  STEAM_TRY(report.given("spatial_weight", args->spatial_weight));
  if (args->problem.samples == 0) return STEAM_OK;
  STEAM_TRY(report.given("x", args->x));
  return report.given("y", args->y);
}

inline steam_status check(const steam_backward_args* args, const Report& report) {
  STEAM_TRY(report.given("args", args));
  STEAM_TRY(check(args->problem, report));
  STEAM_TRY(report.given("channel_weight", args->channel_weight));
  STEAM_TRY(report.given("spatial_weight", args->spatial_weight));
  if (args->dresidual != nullptr && !args->problem.relu) {
    return report.fail(STEAM_BAD_ARGUMENT,
                       "dresidual must be NULL where relu is 0: the residual's gradient is dy itself");
  }
  if (args->problem.samples == 0) return STEAM_OK;
  STEAM_TRY(report.given("dy", args->dy));
  STEAM_TRY(report.given("x", args->x));
  STEAM_TRY(report.given("saved", args->saved));
  return args->problem.relu ? report.given("y", args->y) : STEAM_OK;
}

inline Problem problem_of(const steam_problem& p) {
  Problem out{};
  out.samples = p.samples;
  out.channels = p.channels;
  out.height = p.height;
  out.width = p.width;
  out.grid_h = p.grid_h;
  out.grid_w = p.grid_w;
  out.channel_radius = p.channel_radius;
  out.embed_dim = p.embed_dim;
  out.num_heads = p.num_heads;
  out.spatial_neighbors = p.spatial_neighbors;
  out.self_loops = p.self_loops != 0;
  out.sequential = p.sequential != 0;
  out.channels_last = p.channels_last != 0;
  out.relu = p.relu != 0;
  out.scale = p.scale;
  out.dtype = dtype_of(p.dtype);
  return out;
}

// The arguments of a call that `check` has accepted.
inline ForwardArgs args_of(const steam_forward_args& a) {
  const DType weight = dtype_of(a.problem.weight_dtype);
  return {problem_of(a.problem), {a.channel_weight, weight}, {a.spatial_weight, weight}, a.x, a.residual, a.y, a.saved};
}

inline BackwardArgs args_of(const steam_backward_args& a) {
  const DType weight = dtype_of(a.problem.weight_dtype);
  return {problem_of(a.problem), {a.channel_weight, weight}, {a.spatial_weight, weight}, a.dy, a.x, a.y, a.saved, a.dx,
          a.dresidual,           {a.channel_grad, weight},   {a.spatial_grad, weight}};
}

}  // namespace
}  // namespace steam
