// Second stage of the norm's backward: dweight[n], dbias[n] and those of a second output are the
// sums over the rows of the workspace (blocks, 2 or 4, N), in a fixed order, so that every run
// gives the same bits.
//
//   grid   (groups of 32 columns; y = 0 sums dweight, 1 dbias, 2 dweight1, 3 dbias1)
//   block  (32 columns, 32 strips): strip y adds rows y, y + 32, ...; then the strips are added
#include "core/cuda/launch.h"
#include "core/math.h"
#include "layer_norm/plan.h"

namespace mamba_native::layer_norm::cuda {
namespace {

constexpr int kColumns = 32;
constexpr int kStrips = 32;

// Null: not asked for.
struct Outputs {
  float* of[4];
};

__global__ void __launch_bounds__(kColumns* kStrips)
    column_sums_kernel(const float* workspace, std::int64_t rows, int sums_of_row, int features,
                       const __grid_constant__ Outputs outputs) {
  float* const output = outputs.of[blockIdx.y];
  if (output == nullptr) {
    return;
  }
  __shared__ float sums[kStrips][kColumns];
  const int column = static_cast<int>(blockIdx.x) * kColumns + static_cast<int>(threadIdx.x);
  float sum = 0.0f;
  if (column < features) {
    for (std::int64_t row = threadIdx.y; row < rows; row += kStrips) {
      sum += workspace[(sums_of_row * row + blockIdx.y) * features + column];
    }
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && column < features) {
    for (int strip = 1; strip < kStrips; ++strip) {
      sum += sums[strip][threadIdx.x];
    }
    output[column] = sum;
  }
}

}  // namespace

void sum_workspace(const BackwardParams& params, std::int64_t blocks) {
  const int features = static_cast<int>(params.dweight.size[0]);
  const Outputs outputs{{params.dweight.as<float>(), params.dbias.as<float>(),
                         params.dweight1.as<float>(), params.dbias1.as<float>()}};
  unsigned count = 1;
  for (unsigned sum = 1; sum < 4; ++sum) {
    count = outputs.of[sum] != nullptr ? sum + 1 : count;
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(features, kColumns)), count);
  column_sums_kernel<<<grid, dim3(kColumns, kStrips), 0,
                       static_cast<cudaStream_t>(params.stream)>>>(
      params.workspace.as<const float>(), blocks, static_cast<int>(params.workspace.size[1]),
      features, outputs);
  MAMBA_CUDA_CHECK_LAUNCH();
}

}  // namespace mamba_native::layer_norm::cuda
