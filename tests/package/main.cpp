// A selective scan on plain buffers, on the CPU and on the GPU where there is one. The README shows
// the part between the markers.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <vector>

// README begins
#include "core/error.h"
#include "selective_scan/selective_scan.h"

namespace scan = mamba_native::selective_scan;
using mamba_native::Device;
using mamba_native::DeviceType;
using mamba_native::DType;
using mamba_native::TensorView;

constexpr std::int64_t kBatch = 1, kChannels = 4, kLength = 64, kStates = 16;
constexpr std::int64_t kFloats =
    kChannels * (3 * kBatch * kLength + 3 * kStates + 2 * kBatch * kStates);

// The scan's tensors as views of kFloats that you own; Device{DeviceType::cuda, 0} is a GPU's.
scan::ForwardParams views(float* buffer, Device device) {
  const auto next = [&](std::initializer_list<std::int64_t> sizes) {
    const TensorView view(buffer, DType::f32, sizes, device);
    buffer += view.numel();
    return view;
  };
  scan::ForwardParams params;
  params.in.u = next({kBatch, kChannels, kLength});
  params.in.delta = next({kBatch, kChannels, kLength});
  params.in.A = next({kChannels, kStates});
  params.in.B = next({kChannels, kStates});
  params.in.C = next({kChannels, kStates});
  params.out = next({kBatch, kChannels, kLength});
  params.last_state = next({kBatch, kChannels, kStates});
  params.checkpoints = next({kBatch, kChannels, 1, kStates});  // one for 256 steps
  return params;
}

void scan_on_cpu(std::vector<float>& buffer) {
  const scan::ForwardParams params = views(buffer.data(), Device());
  std::fill_n(params.in.u.as<float>(), params.in.u.numel(), 1.0f);
  std::fill_n(params.in.delta.as<float>(), params.in.delta.numel(), 0.5f);
  std::fill_n(params.in.A.as<float>(), params.in.A.numel(), -1.0f);
  std::fill_n(params.in.B.as<float>(), params.in.B.numel(), 1.0f);
  std::fill_n(params.in.C.as<float>(), params.in.C.numel(), 1.0f);
  scan::forward(params);  // throws mamba_native::Error, naming the argument
}
// README ends

#if MAMBA_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

void print(const char* device, std::vector<float>& buffer) {
  const float* out = views(buffer.data(), Device()).out.as<float>();
  std::printf("%s: y[0] = %.4f, y[63] = %.4f\n", device, out[0], out[kLength - 1]);
}

#if MAMBA_WITH_CUDA
// The CPU's inputs, scanned on the GPU into cleared outputs. False: there is no GPU.
bool scan_on_gpu(std::vector<float>& buffer) {
  int gpus = 0;
  if (cudaGetDeviceCount(&gpus) != cudaSuccess || gpus == 0) {
    return false;
  }
  std::fill(views(buffer.data(), Device()).out.as<float>(), buffer.data() + buffer.size(), 0.0f);
  const std::size_t bytes = buffer.size() * sizeof(float);
  void* memory = nullptr;
  MAMBA_CHECK(cudaMalloc(&memory, bytes) == cudaSuccess, "no GPU memory for ", bytes, " bytes");
  cudaMemcpy(memory, buffer.data(), bytes, cudaMemcpyHostToDevice);
  scan::forward(views(static_cast<float*>(memory), Device{DeviceType::cuda, 0}));
  cudaMemcpy(buffer.data(), memory, bytes, cudaMemcpyDeviceToHost);  // waits for the scan
  MAMBA_CHECK(cudaFree(memory) == cudaSuccess, "the GPU failed");
  return true;
}
#endif

int main() {
  std::vector<float> buffer(kFloats);
  try {
    scan_on_cpu(buffer);
    print("cpu", buffer);
#if MAMBA_WITH_CUDA
    if (scan_on_gpu(buffer)) {
      print("cuda", buffer);
    }
#endif
  } catch (const mamba_native::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
