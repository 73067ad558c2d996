#include "ssd/sums.h"

#include "core/cuda/launch.h"
#include "core/math.h"

namespace mamba_native::ssd::cuda {
namespace {

constexpr int kThreads = 256;

struct Rows {
  float* to;
  const float* parts;
  std::int64_t rows, heads, channels;
  std::int64_t head, channel;  // strides of `to`
  bool per_channel;
};

// A CTA has one sum: its threads take every kThreads-th term, then halve the number of sums.
__global__ void __launch_bounds__(kThreads) sum_rows_kernel(const Rows args) {
  __shared__ float sums[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t index = blockIdx.x;
  const std::int64_t h = args.per_channel ? index / args.channels : index;
  const std::int64_t p = args.per_channel ? index % args.channels : 0;
  const std::int64_t width = args.per_channel ? 1 : args.channels;
  float sum = 0.0f;
  for (std::int64_t i = thread; i < args.rows * width; i += kThreads) {
    sum += args.parts[(i / width * args.heads + h) * args.channels + p + i % width];
  }
  sums[thread] = sum;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (thread < half) {
      sums[thread] += sums[thread + half];
    }
    __syncthreads();
  }
  if (thread == 0) {
    args.to[h * args.head + p * args.channel] = sums[0];
  }
}

struct Parts {
  float* to[2];
  const float* parts[2];
  std::int64_t count, size;  // parts, and elements of one
  std::int64_t begin, steps, groups, states;
  std::int64_t strides[4];
};

//   grid    (blocks of elements; y: which of the two tensors)
__global__ void __launch_bounds__(kThreads) sum_parts_kernel(const __grid_constant__ Parts args) {
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= args.size) {
    return;
  }
  const float* const parts = args.parts[blockIdx.y];
  float sum = 0.0f;
  for (std::int64_t k = 0; k < args.count; ++k) {
    sum += parts[k * args.size + index];
  }
  const std::int64_t n = index % args.states, g = index / args.states % args.groups;
  const std::int64_t t = index / args.states / args.groups;
  args.to[blockIdx.y][t / args.steps * args.strides[0] +
                      (args.begin + t % args.steps) * args.strides[1] + g * args.strides[2] +
                      n * args.strides[3]] = sum;
}

}  // namespace

void sum_rows(const TensorView& to, const float* parts, std::int64_t rows, std::int64_t channels,
              void* stream) {
  if (!to.present()) {
    return;
  }
  Rows args;
  args.to = to.as<float>();
  args.parts = parts;
  args.rows = rows;
  args.heads = to.size[0];
  args.channels = channels;
  args.head = to.stride[0];
  args.per_channel = to.dim == 2;
  args.channel = args.per_channel ? to.stride[1] : 0;
  sum_rows_kernel<<<static_cast<unsigned>(to.numel()), kThreads, 0,
                    static_cast<cudaStream_t>(stream)>>>(args);
  MAMBA_CUDA_CHECK_LAUNCH();
}

void sum_parts(const TensorView& first, const TensorView& second, const float* first_parts,
               const float* second_parts, std::int64_t count, std::int64_t begin, std::int64_t end,
               void* stream) {
  Parts args;
  args.to[0] = first.as<float>();
  args.to[1] = second.as<float>();
  args.parts[0] = first_parts;
  args.parts[1] = second_parts;
  args.count = count;
  args.begin = begin;
  args.steps = end - begin;
  args.groups = first.size[2];
  args.states = first.size[3];
  args.size = first.size[0] * args.steps * args.groups * args.states;
  for (int i = 0; i < 4; ++i) {
    args.strides[i] = first.stride[i];
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(args.size, kThreads)), 2);
  sum_parts_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  MAMBA_CUDA_CHECK_LAUNCH();
}

}  // namespace mamba_native::ssd::cuda
