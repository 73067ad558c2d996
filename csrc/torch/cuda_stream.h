// Torch's current CUDA stream, looked up at run time.
#pragma once

#include <cstdint>

namespace mamba_native::binding {

// A cudaStream_t. The shim that knows it lives in torch_cuda, which CPU-only torch does not have:
// linking against it would keep this library from loading there.
void* current_cuda_stream(std::int32_t device_index);

}  // namespace mamba_native::binding
