#include "gated_norm/reference.h"

#include <cmath>
#include <vector>

#include "core/math.h"
#include "gated_norm/gate.h"

namespace mamba_native::gated_norm::reference {
namespace {

template <class Scalar>
Scalar at(const TensorView& tensor, std::int64_t i) {
  return static_cast<Scalar>(load_double(tensor.data, tensor.dtype, i * tensor.stride[0]));
}

template <class Scalar>
Scalar at(const TensorView& tensor, std::int64_t i, std::int64_t j) {
  return static_cast<Scalar>(
      load_double(tensor.data, tensor.dtype, i * tensor.stride[0] + j * tensor.stride[1]));
}

template <class Scalar>
void put(const TensorView& tensor, std::int64_t i, std::int64_t j, Scalar value) {
  store_float(tensor.data, tensor.dtype, i * tensor.stride[0] + j * tensor.stride[1],
              static_cast<double>(value));
}

template <class Scalar>
Scalar affine(const TensorView& weight, const TensorView& bias, std::int64_t n, Scalar xhat) {
  const Scalar v = xhat * at<Scalar>(weight, n);
  return bias.present() ? v + at<Scalar>(bias, n) : v;
}

}  // namespace

template <class Scalar, class Sum>
void forward(const ForwardParams& params) {
  const Gate gate = gate_of(params);
  const std::int64_t width = params.group_size;
  std::vector<Scalar> u(static_cast<std::size_t>(width));
  for (std::int64_t m = 0; m < params.x.size[0]; ++m) {
    for (std::int64_t group = 0; group * width < params.x.size[1]; ++group) {
      const std::int64_t first = group * width;
      Sum sum = 0;
      for (std::int64_t n = 0; n < width; ++n) {
        Scalar& value = u[static_cast<std::size_t>(n)];
        value = at<Scalar>(params.x, m, first + n);
        if (gate == Gate::before) {
          value *= silu(at<Scalar>(params.z, m, first + n));
        }
        sum += static_cast<Sum>(value);
      }
      const Scalar mean =
          params.is_rms_norm ? Scalar(0) : static_cast<Scalar>(sum / static_cast<Sum>(width));
      Sum squares = 0;
      for (const Scalar value : u) {
        const Scalar centred = value - mean;
        squares += static_cast<Sum>(centred * centred);
      }
      const Scalar rstd = static_cast<Scalar>(
          1 / std::sqrt(squares / static_cast<Sum>(width) + static_cast<Sum>(params.eps)));
      for (std::int64_t n = 0; n < width; ++n) {
        const Scalar xhat = (u[static_cast<std::size_t>(n)] - mean) * rstd;
        Scalar y = affine(params.weight, params.bias, first + n, xhat);
        if (gate == Gate::after) {
          y *= silu(at<Scalar>(params.z, m, first + n));
        }
        put(params.y, m, first + n, y);
      }
      if (params.mean.present()) {
        put(params.mean, group, m, mean);
      }
      put(params.rstd, group, m, rstd);
    }
  }
}

template <class Scalar, class Sum>
void backward(const BackwardParams& params) {
  const Gate gate = gate_of(params);
  const std::int64_t features = params.x.size[1];
  const std::int64_t width = params.group_size;
  std::vector<Sum> dweight(static_cast<std::size_t>(features)), dbias(dweight);
  std::vector<Scalar> xhat(static_cast<std::size_t>(width)), g(xhat);
  for (std::int64_t m = 0; m < params.x.size[0]; ++m) {
    for (std::int64_t first = 0; first < features; first += width) {
      const std::int64_t group = first / width;
      const Scalar mean = params.is_rms_norm ? Scalar(0) : at<Scalar>(params.mean, group, m);
      const Scalar rstd = at<Scalar>(params.rstd, group, m);
      Sum sum1 = 0;
      Sum sum2 = 0;
      for (std::int64_t i = 0; i < width; ++i) {
        const std::int64_t n = first + i;
        const Scalar z = gate == Gate::none ? Scalar(0) : at<Scalar>(params.z, m, n);
        const Scalar dy = at<Scalar>(params.dy, m, n);
        Scalar u = at<Scalar>(params.x, m, n);
        if (gate == Gate::before) {
          u *= silu(z);
        }
        const Scalar x = (u - mean) * rstd;
        Scalar y = affine(params.weight, params.bias, n, x);
        Scalar dv = dy;
        if (gate == Gate::after) {
          put(params.dz, m, n, dy * y * silu_grad(z));
          dv *= silu(z);
          y *= silu(z);
        }
        if (params.y.present()) {
          put(params.y, m, n, y);
        }
        dweight[static_cast<std::size_t>(n)] += static_cast<Sum>(dv * x);
        dbias[static_cast<std::size_t>(n)] += static_cast<Sum>(dv);
        xhat[static_cast<std::size_t>(i)] = x;
        g[static_cast<std::size_t>(i)] = at<Scalar>(params.weight, n) * dv;
        sum1 += static_cast<Sum>(x * g[static_cast<std::size_t>(i)]);
        sum2 += static_cast<Sum>(g[static_cast<std::size_t>(i)]);
      }
      const Scalar c1 = static_cast<Scalar>(sum1 / static_cast<Sum>(width));
      const Scalar c2 =
          params.is_rms_norm ? Scalar(0) : static_cast<Scalar>(sum2 / static_cast<Sum>(width));
      for (std::int64_t i = 0; i < width; ++i) {
        const std::int64_t n = first + i;
        const std::size_t at_i = static_cast<std::size_t>(i);
        const Scalar du = (g[at_i] - xhat[at_i] * c1 - c2) * rstd;
        if (gate != Gate::before) {
          put(params.dx, m, n, du);
          continue;
        }
        const Scalar z = at<Scalar>(params.z, m, n);
        put(params.dx, m, n, du * silu(z));
        put(params.dz, m, n, du * at<Scalar>(params.x, m, n) * silu_grad(z));
      }
    }
  }
  const auto store = [&](const TensorView& to, const std::vector<Sum>& sums) {
    for (std::int64_t n = 0; to.present() && n < features; ++n) {
      store_float(to.data, to.dtype, n * to.stride[0],
                  static_cast<double>(sums[static_cast<std::size_t>(n)]));
    }
  };
  store(params.dweight, dweight);
  store(params.dbias, dbias);
}

template void forward<float, float>(const ForwardParams&);
template void forward<float, double>(const ForwardParams&);
template void forward<double, double>(const ForwardParams&);
template void backward<float, float>(const BackwardParams&);
template void backward<float, double>(const BackwardParams&);
template void backward<double, double>(const BackwardParams&);

}  // namespace mamba_native::gated_norm::reference
