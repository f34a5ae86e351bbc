// A CUDA runtime that launches nothing. It tells a callback of each launch: the kernel, its sizes and its arguments.
#include <cstddef>
#include <map>
#include <string>

namespace {

struct Sizes {
  unsigned x, y, z;
};
using Callback = void (*)(const char* kernel, const unsigned* grid, const unsigned* block, size_t shared,
                          void** arguments);

constexpr int kInvalidValue = 1;
constexpr int kMaxDynamicShared = 8, kMaxSharedOptin = 97;  // cudaFuncAttribute, cudaDeviceAttr
constexpr size_t kSharedWithoutAsking = 48 << 10;

Callback callback = nullptr;
int shared_limit = 0;
int error = 0;
std::map<const void*, size_t> allowed;  // shared memory that a kernel may have

// Filled before main, so it is made on first use.
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> of;
  return of;
}

int failed() {
  error = kInvalidValue;
  return error;
}

int launch(const void* kernel, Sizes grid, Sizes block, void** arguments, size_t shared) {
  if (shared > kSharedWithoutAsking && allowed[kernel] < shared) return failed();
  callback(names().at(kernel).c_str(), &grid.x, &block.x, shared, arguments);
  return 0;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void stub_use(Callback told, int limit) {
  callback = told;
  shared_limit = limit;
}

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* kernel, char*, const char* name, int, void*, void*, void*, void*,
                            int*) {
  names()[kernel] = name;
}

// Between the two calls of <<< >>> and the launch the sizes are kept here.
static Sizes pushed_grid, pushed_block;
static size_t pushed_shared;
static void* pushed_stream;
unsigned __cudaPushCallConfiguration(Sizes grid, Sizes block, size_t shared, void* stream) {
  pushed_grid = grid;
  pushed_block = block;
  pushed_shared = shared;
  pushed_stream = stream;
  return 0;
}
int __cudaPopCallConfiguration(Sizes* grid, Sizes* block, size_t* shared, void* stream) {
  *grid = pushed_grid;
  *block = pushed_block;
  *shared = pushed_shared;
  *static_cast<void**>(stream) = pushed_stream;
  return 0;
}

int __cudaGetKernel(void** handle, const void* kernel) {
  *handle = const_cast<void*>(kernel);
  return 0;
}
int __cudaLaunchKernel(void* kernel, Sizes grid, Sizes block, void** arguments, size_t shared, void*) {
  return launch(kernel, grid, block, arguments, shared);
}
int cudaLaunchKernel(const void* kernel, Sizes grid, Sizes block, void** arguments, size_t shared, void*) {
  return launch(kernel, grid, block, arguments, shared);
}
int cudaFuncSetAttribute(const void* kernel, int attribute, int value) {
  if (attribute != kMaxDynamicShared || value > shared_limit) return failed();
  allowed[kernel] = static_cast<size_t>(value);
  return 0;
}
int cudaGetDevice(int* device) {
  *device = 0;
  return 0;
}
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  if (attribute != kMaxSharedOptin) return failed();
  *value = shared_limit;
  return 0;
}
int cudaGetLastError() {
  const int last = error;
  error = 0;
  return last;
}
const char* cudaGetErrorString(int code) { return code == 0 ? "no error" : "invalid value"; }
}
