// The blocks and threads of a launch on the CPU.
//
// Every thread of a block is a fibre. A fibre runs until it reaches a barrier, a shuffle or the kernel's end, because
// CUDA's threads can wait for each other only there. A seed decides the order of the fibres and of the blocks. Code
// whose behaviour CUDA does not define is an error here, with its place in the source: a barrier or a shuffle that some
// of its threads do not reach or reach at another place, a mask without its caller, and more shared memory than the
// launch requests. Shared memory is full of NaN, and each piece is a heap block of the exact size. Under
// ThreadSanitizer every fibre counts as a thread, and only barriers and launches order memory.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <source_location>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#  include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#  include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char*, int);
extern "C" void AnnotateIgnoreReadsEnd(const char*, int);
extern "C" void AnnotateIgnoreWritesBegin(const char*, int);
extern "C" void AnnotateIgnoreWritesEnd(const char*, int);
#endif

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace cuda_on_host {

using Place = std::source_location;

// Values that a test sets: the order of threads and blocks, the shared memory that a block may have, and failures.
inline std::mt19937_64 random_order{0};
inline int64_t shared_memory_limit = 99 << 10;
inline int64_t failing_launch = 0;  // the number of the launch that is refused, from 1; 0: none
inline bool only_plans = false;     // launches are recorded, but not run
// The launches since a test last cleared them.
struct Launch {
  int64_t blocks, threads, shared_bytes;
};
inline std::vector<Launch> launches;

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 128 << 10;

[[noreturn]] inline void fail(const Place& place, const std::string& what) {
  std::fprintf(stderr, "cuda_on_host: %s:%u: %s\n", place.file_name(), static_cast<unsigned>(place.line()),
               what.c_str());
  std::fflush(stderr);
  std::_Exit(86);
}

// ---------------------------------------------------------------- calls of the sanitizers

struct Sanitizer {
  static void release(char* at) {
#if defined(__SANITIZE_THREAD__)
    __tsan_release(at);
#else
    (void)at;
#endif
  }
  static void acquire(char* at) {
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(at);
#else
    (void)at;
#endif
  }
};

// ThreadSanitizer ignores accesses during the life of an object of this class, because this header's own memory is not
// the kernel's.
struct Unwatched {
#if defined(__SANITIZE_THREAD__)
  Unwatched() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unwatched() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Unwatched() {}
#endif
};

// ---------------------------------------------------------------- threads and blocks

enum class Wait { kNothing, kBarrier, kShuffle, kEnd };

struct Fibre {
  unsigned index = 0;
  void* context[5] = {};  // the target of __builtin_longjmp
  char* stack = nullptr;
  bool started = false;
  void* sanitizer = nullptr;  // AddressSanitizer's fake stack, or ThreadSanitizer's fibre
  Wait wait = Wait::kNothing;
  Place place = Place::current();
  uint32_t mask = 0;
  unsigned source = 0;    // the lane that a shuffle reads
  uint64_t value = 0;     // the value that this thread gives to a shuffle, then the value that it gets
  unsigned barriers = 0;  // passed until now
  size_t pieces = 0;      // of shared memory, taken until now
};

struct Piece {
  std::unique_ptr<unsigned char[]> memory;
  size_t bytes;
};

struct Block {
  dim3 index, size;
  std::vector<Fibre> fibres;
  std::vector<unsigned> ready;
  std::vector<Piece> shared;
  size_t shared_bytes = 0, shared_taken = 0;
  size_t waiting = 0, ended = 0;  // the numbers of threads at a barrier and at the kernel's end
  unsigned first_waiting = 0;
  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;
  void* scheduler[5] = {};
  void* scheduler_fibre = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  char begin = 0, end = 0, barrier[2] = {};  // addresses by which ThreadSanitizer orders memory
};

inline Block* block = nullptr;
inline Fibre* fibre = nullptr;

#if defined(__SANITIZE_THREAD__)
#  define CUDA_ON_HOST_UNWATCHED __attribute__((noinline, no_sanitize_thread))
#else
#  define CUDA_ON_HOST_UNWATCHED
#endif
[[maybe_unused]] CUDA_ON_HOST_UNWATCHED static Block* this_block() { return block; }
[[maybe_unused]] CUDA_ON_HOST_UNWATCHED static dim3 thread_index() { return {fibre->index, 0, 0}; }
[[maybe_unused]] CUDA_ON_HOST_UNWATCHED static dim3 block_index() { return block->index; }
[[maybe_unused]] CUDA_ON_HOST_UNWATCHED static dim3 block_size() { return block->size; }
// Barriers use two flags in turn. With one flag, a thread that is early at the next barrier would order memory for a
// thread that still leaves this one.
[[maybe_unused]] CUDA_ON_HOST_UNWATCHED static char* barrier_flag() { return &block->barrier[fibre->barriers++ % 2]; }

// swapcontext without its two system calls. The sanitizers do not see these functions, because they would treat a jump
// as the end of the stack that it leaves.
#define CUDA_ON_HOST_JUMPS __attribute__((noinline, no_sanitize_address, no_sanitize_thread))
CUDA_ON_HOST_JUMPS inline void jump(void** to) { __builtin_longjmp(to, 1); }
CUDA_ON_HOST_JUMPS inline void change(void** from, void** to) {
  if (__builtin_setjmp(from) == 0) jump(to);
}
void main_of_fibre();
CUDA_ON_HOST_JUMPS inline void start(void** from, Fibre& f) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = f.stack;
  context.uc_stack.ss_size = kStackBytes;
  makecontext(&context, main_of_fibre, 0);
  if (__builtin_setjmp(from) == 0) setcontext(&context);
}

// Switches from a fibre to the scheduler. It returns when the scheduler resumes the fibre.
CUDA_ON_HOST_UNWATCHED inline void leave(bool for_good) {
  Fibre* self = fibre;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &self->sanitizer, block->scheduler_stack,
                                 block->scheduler_stack_bytes);
#elif defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(block->scheduler_fibre, __tsan_switch_to_fiber_no_sync);
#endif
  (void)for_good;
  change(self->context, block->scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->sanitizer, nullptr, nullptr);
#endif
}

inline void resume(Fibre& next) {
  fibre = &next;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, next.stack, kStackBytes);
#elif defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(next.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  if (std::exchange(next.started, true)) {
    change(block->scheduler, next.context);
  } else {
    start(block->scheduler, next);
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void end_thread();
inline void main_of_fibre() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_stack_bytes);
#endif
  Block* b = this_block();
  Sanitizer::acquire(&b->begin);
  b->body(b->arguments);
  Sanitizer::release(&b->end);
  {
    const Unwatched scope;
    end_thread();
  }
  leave(true);
}

// ---------------------------------------------------------------- barriers, shuffles and shared memory

inline bool same(const Place& a, const Place& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

inline std::string describe(const Fibre& f) {
  if (f.wait == Wait::kEnd) return "at the kernel's end";
  char mask[32];
  std::snprintf(mask, sizeof(mask), "shuffle (mask %08x)", static_cast<unsigned>(f.mask));
  return std::string("at the ") + (f.wait == Wait::kBarrier ? "barrier" : mask) + " of " + f.place.file_name() + ":" +
         std::to_string(f.place.line());
}

[[noreturn]] inline void fail_apart(const Fibre& self, const Fibre& other) {
  fail(self.place, "thread " + std::to_string(self.index) + " is " + describe(self) + "; thread " +
                       std::to_string(other.index) + ", which must come there too, is " + describe(other));
}

inline void go_on(Fibre& f) {
  f.wait = Wait::kNothing;
  block->ready.push_back(f.index);
}

inline void end_thread() {
  Block& b = *block;
  fibre->wait = Wait::kEnd;
  if (b.waiting > 0) fail_apart(b.fibres[b.first_waiting], *fibre);
  ++b.ended;
}

inline void barrier(const Place& place) {
  char* at = barrier_flag();
  Sanitizer::release(at);
  {
    const Unwatched scope;
    Block& b = *block;
    Fibre& self = *fibre;
    self.wait = Wait::kBarrier;
    self.place = place;
    if (b.ended > 0) {
      for (const Fibre& other : b.fibres) {
        if (other.wait == Wait::kEnd) fail_apart(self, other);
      }
    }
    if (b.waiting++ == 0) b.first_waiting = self.index;
    if (!same(place, b.fibres[b.first_waiting].place)) fail_apart(self, b.fibres[b.first_waiting]);
    if (b.waiting == b.fibres.size()) {
      b.waiting = 0;
      for (Fibre& f : b.fibres) go_on(f);
    }
    leave(false);
  }
  Sanitizer::acquire(at);
}

// A shuffle moves a value but does not order memory, as in CUDA.
template <class T>
T shuffle(uint32_t mask, T value, unsigned source, const Place& place) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const Unwatched scope;
  Fibre& self = *fibre;
  const unsigned lane = self.index % kWarp, first = self.index - lane;
  const auto named = [mask](unsigned l) { return (mask >> l & 1) != 0; };
  if (!named(lane)) fail(place, "the mask does not name the thread that gives it");
  if (!named(source)) fail(place, "the mask does not name the lane that is read");
  self.wait = Wait::kShuffle;
  self.place = place;
  self.mask = mask;
  self.value = 0;
  std::memcpy(&self.value, &value, sizeof(T));
  self.source = source;
  bool all = true;
  for (unsigned l = 0; l < kWarp; ++l) {
    if (!named(l)) continue;
    if (first + l >= block->fibres.size()) fail(place, "the mask names a lane that the block does not have");
    const Fibre& other = block->fibres[first + l];
    const bool is_here = other.wait == Wait::kShuffle && other.mask == mask && same(other.place, place);
    // A thread at a shuffle whose mask does not name this thread may still come here.
    const bool may_come = other.wait == Wait::kNothing || (other.wait == Wait::kShuffle && !(other.mask >> lane & 1));
    if (!is_here && !may_come) fail_apart(self, other);
    all = all && is_here;
  }
  if (all) {
    uint64_t given[kWarp];
    for (unsigned l = 0; l < kWarp; ++l) given[l] = named(l) ? block->fibres[first + l].value : 0;
    for (unsigned l = 0; l < kWarp; ++l) {
      if (!named(l)) continue;
      Fibre& f = block->fibres[first + l];
      f.value = given[f.source];
      go_on(f);
    }
  }
  leave(false);
  std::memcpy(&value, &self.value, sizeof(T));
  return value;
}

inline unsigned char* take_shared(size_t bytes, const Place& place) {
  const Unwatched scope;
  Block& b = *block;
  const size_t k = fibre->pieces++;
  if (k == b.shared.size()) {
    b.shared.push_back({std::unique_ptr<unsigned char[]>(new unsigned char[bytes]), bytes});
    std::memset(b.shared[k].memory.get(), 0xff, bytes);
    b.shared_taken += (bytes + 15) / 16 * 16;
    if (b.shared_taken > b.shared_bytes) {
      fail(place, "the block takes " + std::to_string(b.shared_taken) +
                      " bytes of shared memory, and was launched with " + std::to_string(b.shared_bytes));
    }
  }
  if (b.shared[k].bytes != bytes) fail(place, "threads of one block take different pieces of shared memory");
  return b.shared[k].memory.get();
}

// ---------------------------------------------------------------- launches

enum Error { kSuccess, kInvalidValue };
inline Error last_error = kSuccess;
inline std::map<const void*, int64_t> shared_memory_of;  // by kernel, if it requested more than 48 KB

class Stacks {
 public:
  explicit Stacks(size_t count) : bytes_(count * kStackBytes) {
    at_ = static_cast<char*>(
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (at_ == MAP_FAILED) fail(Place::current(), "no memory for the threads' stacks");
  }
  Stacks(const Stacks&) = delete;
  ~Stacks() { munmap(at_, bytes_); }
  char* operator[](size_t i) const { return at_ + i * kStackBytes; }

 private:
  size_t bytes_;
  char* at_;
};

inline void run_block(Block& b, const Stacks& stacks, const Place& place) {
  const Unwatched scope;
  block = &b;
#if defined(__SANITIZE_THREAD__)
  b.scheduler_fibre = __tsan_get_current_fiber();
#endif
  Sanitizer::release(&b.begin);
  for (Fibre& f : b.fibres) {
    f.stack = stacks[f.index];
#if defined(__SANITIZE_THREAD__)
    f.sanitizer = __tsan_create_fiber(0);
#endif
  }
  b.ready.resize(b.fibres.size());
  std::iota(b.ready.begin(), b.ready.end(), 0u);
  while (!b.ready.empty()) {
    std::swap(b.ready[random_order() % b.ready.size()], b.ready.back());
    Fibre& next = b.fibres[b.ready.back()];
    b.ready.pop_back();
    resume(next);
  }
  for (const Fibre& f : b.fibres) {
    if (f.wait != Wait::kEnd) fail(f.place, "thread " + std::to_string(f.index) + " waits for ever " + describe(f));
  }
  if (b.shared_taken != b.shared_bytes) {
    fail(place, "the block was launched with " + std::to_string(b.shared_bytes) +
                    " bytes of shared memory, and takes " + std::to_string(b.shared_taken));
  }
#if defined(__SANITIZE_THREAD__)
  for (Fibre& f : b.fibres) __tsan_destroy_fiber(f.sanitizer);
#endif
}

template <class... Parameters, class... Args>
void launch(const Place& place, void (*kernel)(Parameters...), unsigned grid, unsigned size, size_t shared,
            const Args&... args) {
  launches.push_back({grid, size, static_cast<int64_t>(shared)});
  const bool refused = static_cast<int64_t>(launches.size()) == failing_launch;
  const auto limit = shared_memory_of.find(reinterpret_cast<const void*>(kernel));
  const int64_t allowed = limit == shared_memory_of.end() ? 48 << 10 : limit->second;
  if (refused || grid == 0 || size == 0 || size > 1024 || static_cast<int64_t>(shared) > allowed) {
    last_error = kInvalidValue;
    return;
  }
  if (only_plans) return;
  const std::tuple<void (*)(Parameters...), Parameters...> call{kernel, args...};
  using Call = decltype(call);
#if defined(__SANITIZE_THREAD__)
  // Two blocks must not be ordered. So each block has its own memory until all have run.
  const unsigned kept = grid;
#else
  const unsigned kept = 1;
#endif
  std::vector<std::unique_ptr<Stacks>> stacks;
  for (unsigned k = 0; k < kept; ++k) stacks.push_back(std::make_unique<Stacks>(size));
  std::vector<std::unique_ptr<Block>> blocks(kept);
  std::vector<unsigned> order(grid);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random_order);
  for (unsigned k = 0; k < grid; ++k) {
    auto& b = blocks[k % kept];
    b = std::make_unique<Block>();
    b->index = {order[k], 0, 0};
    b->size = {size, 1, 1};
    b->shared_bytes = shared;
    b->arguments = &call;
    b->body = [](const void* c) {
      std::apply([](auto f, const Parameters&... parameters) { f(parameters...); }, *static_cast<Call*>(c));
    };
    b->fibres.resize(size);
    for (unsigned i = 0; i < size; ++i) b->fibres[i].index = i;
    run_block(*b, *stacks[k % kept], place);
  }
  for (const auto& b : blocks) Sanitizer::acquire(&b->end);
  block = nullptr;
}

}  // namespace cuda_on_host
