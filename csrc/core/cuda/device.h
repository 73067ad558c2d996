// What host code asks of a CUDA device. Plain C++: no CUDA header needed.
#pragma once

#include <cstdint>

namespace mamba_native::cuda {

struct DeviceInfo {
  int multiprocessors = 0;
  int major = 0;
  int minor = 0;
  int shared_memory_per_block = 0;  // opt-in limit, bytes
};

// Cached per ordinal. Error when the device is older than sm_75 or has no kernels in this build.
const DeviceInfo& device_info(int ordinal);

// Architectures this library has machine code for, "75;80;...", as compiled.
const char* compiled_architectures();

// The toolkit that compiled the kernels, 13000 for 13.0.
int toolkit_version();

}  // namespace mamba_native::cuda
