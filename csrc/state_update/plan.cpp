#include "state_update/plan.h"

#include "core/cuda/alignment.h"
#include "core/math.h"

namespace mamba_native::state_update::cuda {

using mamba_native::cuda::moves_vectors;

namespace {

bool constant_over(const TensorView& tensor, int dim) {
  return !tensor.present() || tensor.size[dim] <= 1 || tensor.stride[dim] == 0;
}

}  // namespace

bool is_tied(const Params& params) {
  return constant_over(params.A, 1) && constant_over(params.A, 2) && constant_over(params.dt, 2) &&
         constant_over(params.dt_bias, 1);
}

Plan choose(const Params& params, const mamba_native::cuda::DeviceInfo& device) {
  const std::int64_t vector = 16 / size_of(params.state.dtype);
  const std::int64_t d_state = params.state.size[3];
  const bool tied = is_tied(params);
  int lanes = tied ? 8 : 2;  // the narrowest rows of the table
  while (lanes < 32 && lanes * vector < d_state) {
    lanes *= 2;
  }
  const bool vectors = d_state % vector == 0 && moves_vectors(params.state, vector) &&
                       (tied || moves_vectors(params.A, vector));
  Plan plan{0, 0};
  while (vectors && (kConfigs[plan.config].lanes != lanes || kConfigs[plan.config].tied != tied)) {
    ++plan.config;
  }
  // Small problems spread over as many multiprocessors as there are; large ones save on blocks.
  const std::int64_t warps = params.x.size[0] * params.x.size[1] *
                             ceil_div(params.x.size[2], rows_of_warp(kConfigs[plan.config]));
  constexpr int kWarps = 4;
  plan.warps = warps >= std::int64_t{kWarps} * device.multiprocessors ? kWarps : 1;
  return plan;
}

}  // namespace mamba_native::state_update::cuda
