#include "state_update/reference.h"

#include <algorithm>
#include <cmath>

#include "core/math.h"

namespace mamba_native::state_update::reference {
namespace {

template <class Scalar>
Scalar at(const TensorView& tensor, std::int64_t i, std::int64_t j, std::int64_t k = 0) {
  const std::int64_t offset =
      i * tensor.stride[0] + j * tensor.stride[1] + (tensor.dim > 2 ? k * tensor.stride[2] : 0);
  return static_cast<Scalar>(load_double(tensor.data, tensor.dtype, offset));
}

}  // namespace

template <class Scalar, class Sum>
void update(const Params& params) {
  const std::int64_t heads = params.x.size[1];
  const std::int64_t headdim = params.x.size[2];
  const std::int64_t d_state = params.state.size[3];
  const std::int64_t heads_per_group = heads / params.B.size[1];
  const TensorView& state = params.state;
  const TensorView& indices = params.state_batch_indices;
  for (std::int64_t b = 0; b < params.x.size[0]; ++b) {
    const std::int64_t entry =
        indices.present() ? load_index(indices.data, indices.dtype, b * indices.stride[0]) : b;
    for (std::int64_t h = 0; h < heads; ++h) {
      const std::int64_t g = h / heads_per_group;
      for (std::int64_t p = 0; p < headdim; ++p) {
        Sum y = 0;
        if (entry >= 0) {
          const Scalar x = at<Scalar>(params.x, b, h, p);
          Scalar delta = at<Scalar>(params.dt, b, h, p);
          if (params.dt_bias.present()) {
            delta += at<Scalar>(params.dt_bias, h, p);
          }
          if (params.dt_softplus) {
            delta = softplus(delta);
          }
          delta = std::min(std::max(delta, static_cast<Scalar>(params.dt_min)),
                           static_cast<Scalar>(params.dt_max));
          for (std::int64_t n = 0; n < d_state; ++n) {
            const std::int64_t offset = entry * state.stride[0] + h * state.stride[1] +
                                        p * state.stride[2] + n * state.stride[3];
            const Scalar old = static_cast<Scalar>(load_double(state.data, state.dtype, offset));
            const Scalar stored_a = at<Scalar>(params.A, h, p, n);
            const Scalar A = params.A_is_log ? -std::exp(stored_a) : stored_a;
            const Scalar updated =
                old * std::exp(delta * A) + delta * at<Scalar>(params.B, b, g, n) * x;
            y += static_cast<Sum>(updated * at<Scalar>(params.C, b, g, n));
            store_float(state.data, state.dtype, offset, static_cast<double>(updated));
          }
          if (params.D.present()) {
            y += static_cast<Sum>(at<Scalar>(params.D, h, p) * x);
          }
          if (params.z.present()) {
            y *= static_cast<Sum>(silu(at<Scalar>(params.z, b, h, p)));
          }
        }
        store_float(params.out.data, params.out.dtype,
                    b * params.out.stride[0] + h * params.out.stride[1] + p * params.out.stride[2],
                    static_cast<double>(y));
      }
    }
  }
}

template void update<float, float>(const Params&);
template void update<float, double>(const Params&);
template void update<double, double>(const Params&);

}  // namespace mamba_native::state_update::reference
