// Error checks around CUDA calls and launches. Host side of .cu files only.
#pragma once

#include <cuda_runtime.h>

namespace mamba_native::cuda {

// Clears the runtime's sticky error, then throws Error with its text.
[[noreturn]] void fail(cudaError_t status, const char* what, const char* file, int line);

inline void check(cudaError_t status, const char* what, const char* file, int line) {
  if (status != cudaSuccess) {
    fail(status, what, file, line);
  }
}

// Raises a kernel's dynamic shared memory limit. Cheap enough to call before every launch, which
// also makes it right for every device of the process.
template <class Kernel>
void allow_shared_memory(Kernel* kernel, int bytes) {
  constexpr int kWithoutOptIn = 48 * 1024;
  if (bytes > kWithoutOptIn) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          "cudaFuncSetAttribute", __FILE__, __LINE__);
  }
}

}  // namespace mamba_native::cuda

#define MAMBA_CUDA_CHECK(expression) \
  ::mamba_native::cuda::check((expression), #expression, __FILE__, __LINE__)

// After every <<<>>>: reports a launch that the device refused.
#define MAMBA_CUDA_CHECK_LAUNCH() \
  ::mamba_native::cuda::check(cudaGetLastError(), "kernel launch", __FILE__, __LINE__)
