#include "support/device_memory.h"

#include "core/cuda/launch.h"

namespace mamba_native::test {

std::string cuda_unavailable() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    cudaGetLastError();
    return std::string("no CUDA device: ") + cudaGetErrorString(status);
  }
  return count > 0 ? "" : "no CUDA device";
}

void* device_allocate(std::size_t bytes) {
  void* pointer = nullptr;
  MAMBA_CUDA_CHECK(cudaMalloc(&pointer, bytes));
  return pointer;
}

void device_release(void* pointer) { MAMBA_CUDA_CHECK(cudaFree(pointer)); }

void copy_to_device(void* to, const void* from, std::size_t bytes) {
  MAMBA_CUDA_CHECK(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice));
}

void copy_from_device(void* to, const void* from, std::size_t bytes) {
  MAMBA_CUDA_CHECK(cudaDeviceSynchronize());
  MAMBA_CUDA_CHECK(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost));
}

}  // namespace mamba_native::test
