#include "core/cuda/device.h"

#include <array>
#include <mutex>
#include <string>

#include "core/cuda/launch.h"
#include "core/error.h"

namespace mamba_native::cuda {
namespace {

constexpr int kMaxDevices = 64;

#define MAMBA_TEXT_OF(...) #__VA_ARGS__
#define MAMBA_TEXT(...) MAMBA_TEXT_OF(__VA_ARGS__)
// nvcc lists what it compiles for as 750,800,...
constexpr char kArchitectures[] = MAMBA_TEXT(__CUDA_ARCH_LIST__);
#undef MAMBA_TEXT
#undef MAMBA_TEXT_OF

DeviceInfo query(int ordinal) {
  DeviceInfo info;
  MAMBA_CUDA_CHECK(
      cudaDeviceGetAttribute(&info.multiprocessors, cudaDevAttrMultiProcessorCount, ordinal));
  MAMBA_CUDA_CHECK(cudaDeviceGetAttribute(&info.major, cudaDevAttrComputeCapabilityMajor, ordinal));
  MAMBA_CUDA_CHECK(cudaDeviceGetAttribute(&info.minor, cudaDevAttrComputeCapabilityMinor, ordinal));
  MAMBA_CUDA_CHECK(cudaDeviceGetAttribute(&info.shared_memory_per_block,
                                          cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal));
  MAMBA_CHECK(info.major * 10 + info.minor >= 75, "CUDA device ", ordinal, " is sm_", info.major,
              info.minor,
              ", older than sm_75 (Turing), the oldest that these kernels support; move the "
              "tensors to the CPU, where the same operations run");
  return info;
}

}  // namespace

const DeviceInfo& device_info(int ordinal) {
  static std::array<DeviceInfo, kMaxDevices> known;
  static std::mutex mutex;
  MAMBA_CHECK(ordinal >= 0 && ordinal < kMaxDevices, "CUDA device ", ordinal, " is out of range");
  const std::lock_guard<std::mutex> lock(mutex);
  DeviceInfo& info = known[static_cast<std::size_t>(ordinal)];
  if (info.multiprocessors == 0) {
    info = query(ordinal);
  }
  return info;
}

const char* compiled_architectures() { return kArchitectures; }

int toolkit_version() { return CUDART_VERSION; }

void fail(cudaError_t status, const char* what, const char* file, int line) {
  cudaGetLastError();
  std::string hint;
  if (status == cudaErrorNoKernelImageForDevice) {
    hint = std::string("; this library was built for the architectures ") + kArchitectures +
           ": build it for yours with TORCH_CUDA_ARCH_LIST or -DCMAKE_CUDA_ARCHITECTURES";
  }
  mamba_native::fail(what, " failed: ", cudaGetErrorString(status), " (", cudaGetErrorName(status),
                     ") at ", file, ":", line, hint);
}

}  // namespace mamba_native::cuda
