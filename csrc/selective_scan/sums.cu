#include "selective_scan/sums.h"

#include <algorithm>

#include "core/cuda/launch.h"
#include "core/math.h"

namespace mamba_native::selective_scan::cuda {
namespace {

constexpr int kThreads = 256;

// `count` sums of `parts` elements that lie `stride` apart, element i of them at from + offset(i),
// added by one thread each, first to last. Sum i belongs to row i / columns, column i % columns of
// `to`, and its parts begin in row i / columns of `from`.
struct Sums {
  float* to;
  const float* from;
  std::int64_t count, columns;
  std::int64_t from_row;  // floats between rows of `from`
  std::int64_t parts, stride;
  std::int64_t sizes[3], strides[3];  // of the rows of `to`: up to three dimensions, last fastest
  std::int64_t column;                // between columns of `to`
};

__global__ void __launch_bounds__(kThreads) sum_kernel(const Sums sums) {
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= sums.count) {
    return;
  }
  std::int64_t row = index / sums.columns;
  const std::int64_t column = index % sums.columns;
  const float* const from = sums.from + row * sums.from_row + column;
  float sum = 0.0f;
  for (std::int64_t k = 0; k < sums.parts; ++k) {
    sum += from[k * sums.stride];
  }
  std::int64_t offset = column * sums.column;
#pragma unroll
  for (int i = 2; i >= 0; --i) {
    offset += row % sums.sizes[i] * sums.strides[i];
    row /= sums.sizes[i];
  }
  sums.to[offset] = sum;
}

void launch(const Sums& sums, void* stream) {
  if (sums.count > 0) {
    sum_kernel<<<static_cast<unsigned>(ceil_div(sums.count, kThreads)), kThreads, 0,
                 static_cast<cudaStream_t>(stream)>>>(sums);
    MAMBA_CUDA_CHECK_LAUNCH();
  }
}

// The real (0) or imaginary (1) parts of complex numbers.
TensorView component(const TensorView& numbers, int which) {
  TensorView out = numbers;
  --out.dim;
  out.data = numbers.as<float>() + which * numbers.stride[out.dim];
  return out;
}

// A sum to clear.
struct Matrix {
  float* data = nullptr;
  std::int64_t rows = 0, columns = 0, row = 0, column = 0;
};
struct Matrices {
  Matrix all[kCleared];
};

Matrix matrix(const TensorView& tensor) {
  Matrix out;
  if (tensor.present()) {
    out.data = tensor.as<float>();
    out.rows = tensor.dim > 2 ? 1 : tensor.size[0];
    out.columns = tensor.numel() / out.rows;
    out.row = tensor.stride[0];
    out.column = tensor.dim == 2 ? tensor.stride[1] : 1;
  }
  return out;
}

//   grid    (blocks, sum), a grid-stride loop over each sum's elements
__global__ void __launch_bounds__(kThreads)
    clear_kernel(const __grid_constant__ Matrices matrices) {
  const Matrix& matrix = matrices.all[blockIdx.y];
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < matrix.rows * matrix.columns; i += step) {
    matrix.data[i / matrix.columns * matrix.row + i % matrix.columns * matrix.column] = 0.0f;
  }
}

}  // namespace

void clear(const TensorView (&sums)[kCleared], void* stream) {
  constexpr std::int64_t kMostBlocks = 1024;
  Matrices matrices;
  std::int64_t most = 0;
  for (int i = 0; i < kCleared; ++i) {
    matrices.all[i] = matrix(sums[i]);
    const std::int64_t elements = matrices.all[i].rows * matrices.all[i].columns;
    most = elements > most ? elements : most;
  }
  const std::int64_t blocks = std::min(ceil_div(most, kThreads), kMostBlocks);
  clear_kernel<<<dim3(static_cast<unsigned>(blocks), kCleared), kThreads, 0,
                 static_cast<cudaStream_t>(stream)>>>(matrices);
  MAMBA_CUDA_CHECK_LAUNCH();
}

void sum_over_batch(const TensorView& to, const float* parts, std::int64_t batch, void* stream) {
  if (!to.present()) {
    return;
  }
  if (to.dim == 3) {
    sum_over_batch(component(to, 0), parts, batch, stream);
    sum_over_batch(component(to, 1), parts + batch * to.numel() / 2, batch, stream);
    return;
  }
  Sums sums = {};
  sums.to = to.as<float>();
  sums.from = parts;
  sums.count = to.numel();
  sums.columns = to.dim == 2 ? to.size[1] : 1;
  sums.column = to.dim == 2 ? to.stride[1] : 0;
  sums.from_row = sums.columns;
  sums.parts = batch;
  sums.stride = sums.count;
  for (int i = 0; i < 3; ++i) {
    sums.sizes[i] = i == 2 ? to.size[0] : 1;
    sums.strides[i] = i == 2 ? to.stride[0] : 0;
  }
  launch(sums, stream);
}

void sum_over_blocks(const TensorView& to, const float* parts, std::int64_t blocks,
                     std::int64_t row_steps, std::int64_t begin, std::int64_t end, void* stream) {
  const std::int64_t rows = to.size[0] * to.size[1] * to.size[2];
  if (to.dim == 5) {
    const float* const imaginary = parts + blocks * rows * row_steps;
    sum_over_blocks(component(to, 0), parts, blocks, row_steps, begin, end, stream);
    sum_over_blocks(component(to, 1), imaginary, blocks, row_steps, begin, end, stream);
    return;
  }
  Sums sums = {};
  sums.to = to.as<float>() + begin * to.stride[3];
  sums.from = parts;
  sums.count = rows * (end - begin);
  sums.columns = end - begin;
  sums.column = to.stride[3];
  sums.from_row = row_steps;
  sums.parts = blocks;
  sums.stride = rows * row_steps;
  for (int i = 0; i < 3; ++i) {
    sums.sizes[i] = to.size[i];
    sums.strides[i] = to.stride[i];
  }
  launch(sums, stream);
}

}  // namespace mamba_native::selective_scan::cuda
