#include "layer_norm/reference.h"

#include <cmath>
#include <vector>

namespace mamba_native::layer_norm::reference {
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

void put(const TensorView& tensor, std::int64_t i, double value) {
  store_float(tensor.data, tensor.dtype, i * tensor.stride[0], value);
}

void put(const TensorView& tensor, std::int64_t i, std::int64_t j, double value) {
  store_float(tensor.data, tensor.dtype, i * tensor.stride[0] + j * tensor.stride[1], value);
}

}  // namespace

template <class Scalar, class Sum>
void forward(const ForwardParams& params) {
  const std::int64_t features = params.x.size[1];
  std::vector<Scalar> h(static_cast<std::size_t>(features));
  for (std::int64_t m = 0; m < params.x.size[0]; ++m) {
    Sum sum = 0;
    for (std::int64_t n = 0; n < features; ++n) {
      Scalar& value = h[static_cast<std::size_t>(n)];
      value = at<Scalar>(params.x, m, n);
      if (params.residual.present()) {
        value += at<Scalar>(params.residual, m, n);
      }
      sum += static_cast<Sum>(value);
      if (params.residual_out.present()) {
        put(params.residual_out, m, n, static_cast<double>(value));
      }
    }
    const Scalar mean =
        params.is_rms_norm ? Scalar(0) : static_cast<Scalar>(sum / static_cast<Sum>(features));
    Sum squares = 0;
    for (const Scalar value : h) {
      const Scalar centred = value - mean;
      squares += static_cast<Sum>(centred * centred);
    }
    const Scalar rstd = static_cast<Scalar>(
        1 / std::sqrt(squares / static_cast<Sum>(features) + static_cast<Sum>(params.eps)));
    for (std::int64_t n = 0; n < features; ++n) {
      Scalar y = (h[static_cast<std::size_t>(n)] - mean) * rstd * at<Scalar>(params.weight, n);
      if (params.bias.present()) {
        y += at<Scalar>(params.bias, n);
      }
      put(params.y, m, n, static_cast<double>(y));
    }
    if (params.mean.present()) {
      put(params.mean, m, static_cast<double>(mean));
    }
    put(params.rstd, m, static_cast<double>(rstd));
  }
}

template <class Scalar, class Sum>
void backward(const BackwardParams& params) {
  const std::int64_t features = params.h.size[1];
  std::vector<Sum> dweight(static_cast<std::size_t>(features));
  std::vector<Sum> dbias(static_cast<std::size_t>(features));
  for (std::int64_t m = 0; m < params.h.size[0]; ++m) {
    const Scalar mean = params.is_rms_norm ? Scalar(0) : at<Scalar>(params.mean, m);
    const Scalar rstd = at<Scalar>(params.rstd, m);
    Sum sum1 = 0;
    Sum sum2 = 0;
    for (std::int64_t n = 0; n < features; ++n) {
      const Scalar xhat = (at<Scalar>(params.h, m, n) - mean) * rstd;
      const Scalar dy = at<Scalar>(params.dy, m, n);
      const Scalar wdy = at<Scalar>(params.weight, n) * dy;
      sum1 += static_cast<Sum>(xhat * wdy);
      sum2 += static_cast<Sum>(wdy);
      dweight[static_cast<std::size_t>(n)] += static_cast<Sum>(dy * xhat);
      dbias[static_cast<std::size_t>(n)] += static_cast<Sum>(dy);
    }
    const Scalar c1 = static_cast<Scalar>(sum1 / static_cast<Sum>(features));
    const Scalar c2 =
        params.is_rms_norm ? Scalar(0) : static_cast<Scalar>(sum2 / static_cast<Sum>(features));
    for (std::int64_t n = 0; n < features; ++n) {
      const Scalar xhat = (at<Scalar>(params.h, m, n) - mean) * rstd;
      const Scalar wdy = at<Scalar>(params.weight, n) * at<Scalar>(params.dy, m, n);
      Scalar dh = (wdy - xhat * c1 - c2) * rstd;
      if (params.dresidual_out.present()) {
        dh += at<Scalar>(params.dresidual_out, m, n);
      }
      put(params.dx, m, n, static_cast<double>(dh));
      if (params.dresidual.present()) {
        put(params.dresidual, m, n, static_cast<double>(dh));
      }
    }
  }
  for (std::int64_t n = 0; n < features; ++n) {
    put(params.dweight, n, static_cast<double>(dweight[static_cast<std::size_t>(n)]));
    if (params.dbias.present()) {
      put(params.dbias, n, static_cast<double>(dbias[static_cast<std::size_t>(n)]));
    }
  }
}

template void forward<float, float>(const ForwardParams&);
template void forward<float, double>(const ForwardParams&);
template void forward<double, double>(const ForwardParams&);
template void backward<float, float>(const BackwardParams&);
template void backward<float, double>(const BackwardParams&);
template void backward<double, double>(const BackwardParams&);

}  // namespace mamba_native::layer_norm::reference
