#include "core/cuda/copy.h"

#include "core/cuda/launch.h"
#include "core/math.h"

namespace mamba_native::cuda {
namespace {

constexpr int kThreads = 256;

// to[i, j, k, l] = from[i, j, k, l] or 0: one thread per element, last dimension fastest. Nothing
// here is tuned. __grid_constant__ lets the loop
// index the views where they lie; without it each thread copies both to its stack.
__global__ void __launch_bounds__(kThreads)
    copy_kernel(const __grid_constant__ TensorView to, const __grid_constant__ TensorView from,
                std::int64_t count) {
  std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= count) {
    return;
  }
  std::int64_t to_offset = 0;
  std::int64_t from_offset = 0;
  for (int i = to.dim - 1; i >= 0; --i) {
    const std::int64_t at = index % to.size[i];
    index /= to.size[i];
    to_offset += at * to.stride[i];
    from_offset += at * from.stride[i];
  }
  static_cast<float*>(to.data)[to_offset] =
      from.dim < 0 ? 0.0f : static_cast<const float*>(from.data)[from_offset];
}

}  // namespace

void copy_or_zero(const TensorView& to, const TensorView& from, void* stream) {
  const std::int64_t count = to.present() ? to.numel() : 0;
  if (count == 0) {
    return;
  }
  copy_kernel<<<static_cast<unsigned>(ceil_div(count, kThreads)), kThreads, 0,
                static_cast<cudaStream_t>(stream)>>>(to, from, count);
  MAMBA_CUDA_CHECK_LAUNCH();
}

}  // namespace mamba_native::cuda
