// Second stage of the norm's backward: dweight[n] and dbias[n] are the sums over the rows of the
// workspace (blocks, 2, N), in a fixed order, so that every run gives the same bits.
//
//   grid   (groups of 32 columns; y = 0 sums dweight, 1 dbias)
//   block  (32 columns, 32 strips): strip y adds rows y, y + 32, ...; then the strips are added
#include "core/cuda/launch.h"
#include "core/math.h"
#include "layer_norm/plan.h"

namespace mamba_native::layer_norm::cuda {
namespace {

constexpr int kColumns = 32;
constexpr int kStrips = 32;

__global__ void __launch_bounds__(kColumns* kStrips)
    column_sums_kernel(const float* workspace, std::int64_t rows, int features, float* dweight,
                       float* dbias) {
  __shared__ float sums[kStrips][kColumns];
  const int column = static_cast<int>(blockIdx.x) * kColumns + static_cast<int>(threadIdx.x);
  float sum = 0.0f;
  if (column < features) {
    for (std::int64_t row = threadIdx.y; row < rows; row += kStrips) {
      sum += workspace[(2 * row + blockIdx.y) * features + column];
    }
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && column < features) {
    for (int strip = 1; strip < kStrips; ++strip) {
      sum += sums[strip][threadIdx.x];
    }
    (blockIdx.y == 0 ? dweight : dbias)[column] = sum;
  }
}

}  // namespace

void sum_workspace(const BackwardParams& params, std::int64_t blocks) {
  const int features = static_cast<int>(params.dweight.size[0]);
  const dim3 grid(static_cast<unsigned>(ceil_div(features, kColumns)),
                  params.dbias.present() ? 2u : 1u);
  column_sums_kernel<<<grid, dim3(kColumns, kStrips), 0,
                       static_cast<cudaStream_t>(params.stream)>>>(
      params.workspace.as<const float>(), blocks, features, params.dweight.as<float>(),
      params.dbias.as<float>());
  MAMBA_CUDA_CHECK_LAUNCH();
}

}  // namespace mamba_native::layer_norm::cuda
