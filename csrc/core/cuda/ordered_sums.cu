//   grid   (groups of 32 columns; y = 0 to 3: which of the sums)
//   block  (32 columns, 32 strips): strip y adds rows y, y + 32, ...; then the strips are added
#include "core/cuda/ordered_sums.h"

#include "core/cuda/launch.h"
#include "core/math.h"

namespace mamba_native::cuda {
namespace {

constexpr int kColumns = 32;
constexpr int kStrips = 32;

__global__ void __launch_bounds__(kColumns* kStrips)
    ordered_sums_kernel(const __grid_constant__ OrderedSums sums, std::int64_t rows,
                        std::int64_t pitch) {
  const OrderedSum& of = sums.of[blockIdx.y];
  if (of.sum == nullptr) {
    return;
  }
  __shared__ float strips[kStrips][kColumns];
  const std::int64_t column = std::int64_t{blockIdx.x} * kColumns + threadIdx.x;
  float sum = 0.0f;
  if (column < of.count) {
    for (std::int64_t row = threadIdx.y; row < rows; row += kStrips) {
      sum += of.partials[row * pitch + column];
    }
  }
  strips[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && column < of.count) {
    for (int strip = 1; strip < kStrips; ++strip) {
      sum += strips[strip][threadIdx.x];
    }
    of.sum[column] = sum;
  }
}

}  // namespace

void add_in_order(const OrderedSums& sums, std::int64_t rows, std::int64_t pitch,
                  cudaStream_t stream) {
  unsigned used = 0;
  std::int64_t columns = 0;
  for (unsigned i = 0; i < OrderedSums::kMost; ++i) {
    if (sums.of[i].sum != nullptr) {
      used = i + 1;
      columns = sums.of[i].count > columns ? sums.of[i].count : columns;
    }
  }
  if (columns == 0) {
    return;
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(columns, kColumns)), used);
  ordered_sums_kernel<<<grid, dim3(kColumns, kStrips), 0, stream>>>(sums, rows, pitch);
  MAMBA_CUDA_CHECK_LAUNCH();
}

}  // namespace mamba_native::cuda
