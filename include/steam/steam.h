/* One STEAM unit from C or C++, without torch: y = relu?(scale * x * channel_gate * spatial_gate + residual?).
 *
 * Link steam::cpu or steam::cuda of find_package(steam). Maps are dense, N C H W or N H W C in memory. Every function
 * that returns a steam_status writes one line on what was wrong into `message`, which holds STEAM_MESSAGE_BYTES or is
 * NULL, and touches no output where it returns STEAM_BAD_ARGUMENT or STEAM_OUT_OF_MEMORY. */
#ifndef STEAM_STEAM_H_
#define STEAM_STEAM_H_

#include <stdint.h>

#if defined(__GNUC__)
#  define STEAM_API __attribute__((visibility("default")))
#else
#  define STEAM_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { STEAM_MESSAGE_BYTES = 256 };

typedef enum steam_status {
  STEAM_OK = 0,
  STEAM_BAD_ARGUMENT = 1,
  STEAM_OUT_OF_MEMORY = 2,
  STEAM_CUDA_ERROR = 3
} steam_status;

typedef enum steam_dtype { STEAM_FLOAT32 = 0, STEAM_FLOAT64 = 1, STEAM_FLOAT16 = 2, STEAM_BFLOAT16 = 3 } steam_dtype;

/* A unit and the shape of a batch. Flags are 0 or 1. */
typedef struct steam_problem {
  int64_t samples;           /* N, 0 or more */
  int64_t channels;          /* C */
  int64_t height;            /* H */
  int64_t width;             /* W */
  int64_t grid_h;            /* gh <= H */
  int64_t grid_w;            /* gw <= W */
  int64_t channel_radius;    /* the ring joins c to c - radius ... c + radius */
  int32_t embed_dim;         /* d, columns of a weight */
  int32_t num_heads;         /* h, divides d */
  int32_t spatial_neighbors; /* 4 or 8 */
  int32_t self_loops;        /* whether a node attends to itself too */
  int32_t sequential;        /* whether space looks at the channel-gated map */
  int32_t channels_last;     /* memory order N H W C */
  int32_t relu;              /* y = max(gated x + residual, 0) */
  steam_dtype dtype;         /* of x, residual, y and their gradients */
  steam_dtype weight_dtype;  /* of both weights and their gradients: STEAM_FLOAT32 or dtype */
  double scale;              /* of the gates */
} steam_problem;

/* The usual unit on a batch: a 7 x 7 grid (or one cell a pixel), d = 8, four heads, float32, N C H W. */
static inline steam_problem steam_usual_problem(int64_t samples, int64_t channels, int64_t height, int64_t width) {
  steam_problem p;
  p.samples = samples;
  p.channels = channels;
  p.height = height;
  p.width = width;
  p.grid_h = height < 7 ? height : 7;
  p.grid_w = width < 7 ? width : 7;
  p.channel_radius = 1;
  p.embed_dim = 8;
  p.num_heads = 4;
  p.spatial_neighbors = 4;
  p.self_loops = 1;
  p.sequential = 1;
  p.channels_last = 0;
  p.relu = 0;
  p.dtype = STEAM_FLOAT32;
  p.weight_dtype = STEAM_FLOAT32;
  p.scale = 1;
  return p;
}

/* Bytes of `saved`: for each sample channel tokens, channel pre-activations, spatial tokens, spatial pre-activations,
 * 2 (C + gh gw) numbers, float64 where dtype is, else float32. */
static inline int64_t steam_saved_bytes(const steam_problem* p) {
  return p->samples * 2 * (p->channels + p->grid_h * p->grid_w) * (p->dtype == STEAM_FLOAT64 ? 8 : 4);
}

typedef struct steam_forward_args {
  steam_problem problem;
  const void* channel_weight; /* four rows of d numbers: query, key, value, output */
  const void* spatial_weight;
  const void* x;
  const void* residual; /* or NULL */
  void* y;              /* may be x, which must then not overlap residual */
  void* saved;          /* NULL where there will be no backward */
} steam_forward_args;

/* An output that is NULL is not asked for. */
typedef struct steam_backward_args {
  steam_problem problem;
  const void* channel_weight;
  const void* spatial_weight;
  const void* dy;
  const void* x;
  const void* y;     /* read where problem.relu */
  const void* saved; /* as the forward wrote it */
  void* dx;
  void* dresidual; /* only where problem.relu: without it the residual's gradient is dy */
  void* channel_grad;
  void* spatial_grad;
} steam_backward_args;

/* ---- steam::cpu ---- */

/* Where the kernels' tasks run: `run` calls body(context, task) once for each task of [0, tasks), on any of `threads`
 * threads, and returns when all are done; it must not throw. For the time of a task its thread has the floating-point
 * mode of the thread that made the call (rounding, denormals), and afterwards its own again. Results are the same bits
 * for any number of threads. Working memory is asked for before the first task, grows with `threads`, and up to 64 MiB
 * for each of them stay with the calling thread for its next call. */
typedef struct steam_parallel {
  int64_t threads;
  void (*run)(int64_t tasks, void (*body)(void* context, int64_t task), void* context);
} steam_parallel;

/* `parallel` is NULL for the calling thread alone. */
STEAM_API steam_status steam_cpu_forward(const steam_forward_args* args, const steam_parallel* parallel, char* message);
STEAM_API steam_status steam_cpu_backward(const steam_backward_args* args, const steam_parallel* parallel,
                                          char* message);

/* Names of the variants that this processor can run, best first, between commas. */
STEAM_API const char* steam_cpu_supported(void);
/* The variant in use: the best, until another is selected. */
STEAM_API const char* steam_cpu_variant(void);
/* 0 if the named variant is now in use, 1 if there is none of that name or the processor cannot run it. */
STEAM_API int steam_cpu_select(const char* name);

/* Bytes of the last-level cache that a call counts on: where x and y take more, outputs are written past the caches. It
 * decides how long a call takes, never its results. */
STEAM_API int64_t steam_cpu_cache_bytes(void);
/* 0 if calls now count on so many bytes, 1 if the number is negative. Until then it is 8 MiB for each processor that
 * the process may run on, and at most what the system reports. */
STEAM_API int steam_cpu_set_cache_bytes(int64_t bytes);
/* What that follows from: the size of the cache by the system (0 where it reports none), and the processors, by
 * affinity and control group. */
STEAM_API int64_t steam_cpu_reported_cache_bytes(void);
STEAM_API int64_t steam_cpu_processors(void);

/* ---- steam::cuda: all pointers of the args are memory of the current device, `stream` is a cudaStream_t ---- */

/* Bytes of device memory, aligned to 16, that a call on this problem needs beside its arguments. */
STEAM_API steam_status steam_cuda_forward_workspace(const steam_problem* problem, int64_t* bytes, char* message);
STEAM_API steam_status steam_cuda_backward_workspace(const steam_problem* problem, int64_t* bytes, char* message);

/* Queue the call on `stream` and return without waiting. `workspace` may hold anything, must not be touched until the
 * stream has passed the call, and may be NULL where none is needed. */
STEAM_API steam_status steam_cuda_forward(const steam_forward_args* args, void* workspace, void* stream, char* message);
STEAM_API steam_status steam_cuda_backward(const steam_backward_args* args, void* workspace, void* stream,
                                           char* message);

/* STEAM_OK where the current device can run the kernels, else STEAM_CUDA_ERROR and why not in `message`. */
STEAM_API steam_status steam_cuda_usable(char* message);
/* The architectures that the kernels were built for, between commas, as in "750,800,900". */
STEAM_API const char* steam_cuda_architectures(void);

#ifdef __cplusplus
}
#endif

#endif
