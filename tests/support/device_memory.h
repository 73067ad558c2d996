// Device memory for tests. In a build without CUDA there is no device and `unavailable` says so.
#pragma once

#include <cstddef>
#include <string>

namespace mamba_native::test {

// Empty when a CUDA device can be used; otherwise why not, for GTEST_SKIP.
std::string cuda_unavailable();

void* device_allocate(std::size_t bytes);
void device_release(void* pointer);
void copy_to_device(void* to, const void* from, std::size_t bytes);
// Waits for all work on the device first.
void copy_from_device(void* to, const void* from, std::size_t bytes);

}  // namespace mamba_native::test
