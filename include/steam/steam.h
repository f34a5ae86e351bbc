/* One STEAM unit from C or C++, without torch: y = relu?(scale * x * channel_gate * spatial_gate + residual?).
 *
 * Link steam::cpu or steam::cuda of find_package(steam). Maps are dense, in NCHW or channels_last (NHWC). A function
 * that returns a steam_status explains a failure in one line of text in `message`. `message` has STEAM_MESSAGE_BYTES or
 * is NULL. A function that returns STEAM_BAD_ARGUMENT or STEAM_OUT_OF_MEMORY has changed no output. */
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

/* The shape of a batch and the options of a unit. Flags are 0 or 1. */
typedef struct steam_problem {
  int64_t samples;           /* N, 0 or more */
  int64_t channels;          /* C */
  int64_t height;            /* H */
  int64_t width;             /* W */
  int64_t grid_h;            /* gh <= H */
  int64_t grid_w;            /* gw <= W */
  int64_t channel_radius;    /* the ring joins c to c - radius ... c + radius */
  int32_t embed_dim;         /* d, the columns of a weight */
  int32_t num_heads;         /* h, which divides d */
  int32_t spatial_neighbors; /* 4 or 8 */
  int32_t self_loops;        /* whether a node also attends to itself */
  int32_t sequential;        /* whether the spatial tokens are means of the channel-gated map */
  int32_t channels_last;     /* the memory format of all maps: channels_last, else NCHW */
  int32_t relu;              /* y = max(gated x + residual, 0) */
  steam_dtype dtype;         /* of x, residual, y and their gradients */
  steam_dtype weight_dtype;  /* of both weights and their gradients: STEAM_FLOAT32 or dtype */
  double scale;              /* of the gates */
} steam_problem;

/* A problem with the default options of the Python package, in float32 and NCHW. The grid is
 * min(7, H) x min(7, W). */
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

/* The bytes of `saved`. It has a row of 2 * (C + gh * gw) numbers for each sample: the channel tokens, the channel
 * pre-activations, the spatial tokens and the spatial pre-activations. The numbers are float64 if dtype is float64,
 * else float32. */
static inline int64_t steam_saved_bytes(const steam_problem* p) {
  return p->samples * 2 * (p->channels + p->grid_h * p->grid_w) * (p->dtype == STEAM_FLOAT64 ? 8 : 4);
}

typedef struct steam_forward_args {
  steam_problem problem;
  const void* channel_weight; /* four rows of d numbers: query, key, value, output */
  const void* spatial_weight;
  const void* x;
  const void* residual; /* may be NULL */
  void* y;              /* may be x; then x must not overlap residual */
  void* saved;          /* may be NULL, then no backward call can follow */
} steam_forward_args;

/* An output that is NULL is not computed. */
typedef struct steam_backward_args {
  steam_problem problem;
  const void* channel_weight;
  const void* spatial_weight;
  const void* dy;
  const void* x;
  const void* y;     /* read only if problem.relu */
  const void* saved; /* written by the forward call */
  void* dx;
  void* dresidual; /* NULL without problem.relu, because the residual's gradient is then dy itself */
  void* channel_grad;
  void* spatial_grad;
} steam_backward_args;

/* ---- steam::cpu ---- */

/* The threads that run the kernels' tasks. `run` calls body(context, task) once for each task in [0, tasks), on any of
 * `threads` threads. It returns when all tasks are done, and must not throw. During a task the thread has the
 * floating-point mode (rounding, denormals) of the thread that made the call, and after the task its own mode again.
 * Results have the same bits for any number of threads. Working memory is allocated before the first task and grows
 * with `threads`. The calling thread keeps up to 64 MiB for each of the `threads` for its next call. */
typedef struct steam_parallel {
  int64_t threads;
  void (*run)(int64_t tasks, void (*body)(void* context, int64_t task), void* context);
} steam_parallel;

/* If `parallel` is NULL, the calling thread runs all tasks. */
STEAM_API steam_status steam_cpu_forward(const steam_forward_args* args, const steam_parallel* parallel, char* message);
STEAM_API steam_status steam_cpu_backward(const steam_backward_args* args, const steam_parallel* parallel,
                                          char* message);

/* The names of the variants that this processor can run, the best first, separated by commas. */
STEAM_API const char* steam_cpu_supported(void);
/* The variant in use. It is the best variant until another is selected. It is "" in a library that was built for
 * another processor alone; all calls of the kernels then return STEAM_BAD_ARGUMENT. */
STEAM_API const char* steam_cpu_variant(void);
/* Selects the named variant and returns 0. Returns 1 if no variant has this name or the processor cannot run it. */
STEAM_API int steam_cpu_select(const char* name);

/* The bytes of the last-level cache that a call counts on. If x and y together are larger, outputs are written past the
 * caches; but calls of up to four threads on Intel's processors with AVX-512 do so only if the number was set, because
 * it takes longer there. The number changes the time of a call, never its results. */
STEAM_API int64_t steam_cpu_cache_bytes(void);
/* Sets that number and returns 0. Returns 1 if `bytes` is negative. The default is 8 MiB for each processor that the
 * process may run on, and at most the size that the system reports. */
STEAM_API int steam_cpu_set_cache_bytes(int64_t bytes);
/* Returns to the default. */
STEAM_API void steam_cpu_unset_cache_bytes(void);
/* The two numbers that decide the default: the size of the cache that the system reports, or 0 if it reports no size,
 * and the processors that affinity and control group allow. */
STEAM_API int64_t steam_cpu_reported_cache_bytes(void);
STEAM_API int64_t steam_cpu_processors(void);

/* ---- steam::cuda ---- */

/* The pointers in the args are to memory of the current device. `stream` is a cudaStream_t. */

/* `bytes` gets the size of the workspace that a call with this problem needs: device memory, aligned to 16 bytes. */
STEAM_API steam_status steam_cuda_forward_workspace(const steam_problem* problem, int64_t* bytes, char* message);
STEAM_API steam_status steam_cuda_backward_workspace(const steam_problem* problem, int64_t* bytes, char* message);

/* These functions queue the kernels of a call on `stream`, and do not wait for them. The call ignores the content of
 * `workspace`, which may be NULL if 0 bytes are needed. The workspace must not be used for anything else until the
 * stream has run the kernels. */
STEAM_API steam_status steam_cuda_forward(const steam_forward_args* args, void* workspace, void* stream, char* message);
STEAM_API steam_status steam_cuda_backward(const steam_backward_args* args, void* workspace, void* stream,
                                           char* message);

/* Returns STEAM_OK if the current device can run the kernels, else STEAM_CUDA_ERROR and the reason in `message`. */
STEAM_API steam_status steam_cuda_usable(char* message);
/* The architectures that the kernels were built for, separated by commas, as in "750,800,900". */
STEAM_API const char* steam_cuda_architectures(void);

#ifdef __cplusplus
}
#endif

#endif
