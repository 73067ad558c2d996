// The same interface in a build without CUDA.
#include "core/error.h"
#include "support/device_memory.h"

namespace mamba_native::test {

std::string cuda_unavailable() { return "built without CUDA"; }

void* device_allocate(std::size_t) { fail(cuda_unavailable()); }
void device_release(void*) { fail(cuda_unavailable()); }
void copy_to_device(void*, const void*, std::size_t) { fail(cuda_unavailable()); }
void copy_from_device(void*, const void*, std::size_t) { fail(cuda_unavailable()); }

}  // namespace mamba_native::test
