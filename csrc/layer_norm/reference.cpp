#include "layer_norm/reference.h"

#include <cmath>
#include <vector>

#include "layer_norm/branches.h"
#include "layer_norm/dropout.h"

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

// What dropout multiplies an element by: 0, or 1 / (1 - p).
template <class Scalar>
class Factors {
 public:
  Factors(const DropoutParams& params, unsigned branch)
      : dropout_(dropout_of(params.p)),
        scale_(params.p < 1.0 ? Scalar(1) / static_cast<Scalar>(1.0 - params.p) : Scalar(0)),
        seed_(params.seed.present() ? *params.seed.as<const std::uint64_t>() : 0),
        branch_(branch) {}

  bool stays(std::int64_t m, std::int64_t n) const {
    const unsigned bits = kept(dropout_, seed_, branch_, m, n / kDropoutGroup);
    return (bits >> n % kDropoutGroup & 1u) != 0;
  }
  // Dropped infinities and NaNs are gone, too.
  Scalar apply(Scalar value, std::int64_t m, std::int64_t n) const {
    return dropout_.threshold == 0 ? value : stays(m, n) ? value * scale_ : Scalar(0);
  }

 private:
  Dropout dropout_;
  Scalar scale_;
  std::uint64_t seed_;
  unsigned branch_;
};

}  // namespace

template <class Scalar, class Sum>
void forward(const ForwardParams& params) {
  const std::int64_t features = params.x.size[1];
  const Factors<Scalar> factors(params.dropout, 0);
  const Factors<Scalar> factors1(params.dropout, 1);
  const bool branches = has_branches(params);
  std::vector<Scalar> h(static_cast<std::size_t>(features));
  for (std::int64_t m = 0; m < params.x.size[0]; ++m) {
    Sum sum = 0;
    for (std::int64_t n = 0; n < features; ++n) {
      Scalar& value = h[static_cast<std::size_t>(n)];
      value = at<Scalar>(params.x, m, n);
      if (branches) {
        if (params.rowscale.present()) {
          value *= at<Scalar>(params.rowscale, m);
        }
        value = factors.apply(value, m, n);
        if (params.x1.present()) {
          value += factors1.apply(at<Scalar>(params.x1, m, n), m, n);
        }
        if (params.mask != nullptr) {
          params.mask[m * features + n] = factors.stays(m, n) ? 1 : 0;
        }
        if (params.mask1 != nullptr) {
          params.mask1[m * features + n] = factors1.stays(m, n) ? 1 : 0;
        }
      }
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
    const auto affine = [&](const TensorView& weight, const TensorView& bias,
                            const TensorView& to) {
      for (std::int64_t n = 0; n < features; ++n) {
        Scalar y = (h[static_cast<std::size_t>(n)] - mean) * rstd * at<Scalar>(weight, n);
        if (bias.present()) {
          y += at<Scalar>(bias, n);
        }
        put(to, m, n, static_cast<double>(y));
      }
    };
    affine(params.weight, params.bias, params.y);
    if (params.weight1.present()) {
      affine(params.weight1, params.bias1, params.y1);
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
  const bool second = params.weight1.present();
  const Factors<Scalar> factors(params.dropout, 0);
  const Factors<Scalar> factors1(params.dropout, 1);
  const bool branches = has_branches(params);
  const std::vector<Sum> zeros(static_cast<std::size_t>(features));
  std::vector<Sum> dweight = zeros, dbias = zeros, dweight1 = zeros, dbias1 = zeros;
  for (std::int64_t m = 0; m < params.h.size[0]; ++m) {
    const Scalar mean = params.is_rms_norm ? Scalar(0) : at<Scalar>(params.mean, m);
    const Scalar rstd = at<Scalar>(params.rstd, m);
    // Gradient of xhat.
    const auto gradient = [&](std::int64_t n) {
      Scalar g = at<Scalar>(params.weight, n) * at<Scalar>(params.dy, m, n);
      if (second) {
        g += at<Scalar>(params.weight1, n) * at<Scalar>(params.dy1, m, n);
      }
      return g;
    };
    Sum sum1 = 0;
    Sum sum2 = 0;
    for (std::int64_t n = 0; n < features; ++n) {
      const std::size_t i = static_cast<std::size_t>(n);
      const Scalar xhat = (at<Scalar>(params.h, m, n) - mean) * rstd;
      const Scalar dy = at<Scalar>(params.dy, m, n);
      const Scalar g = gradient(n);
      sum1 += static_cast<Sum>(xhat * g);
      sum2 += static_cast<Sum>(g);
      dweight[i] += static_cast<Sum>(dy * xhat);
      dbias[i] += static_cast<Sum>(dy);
      if (second) {
        const Scalar dy1 = at<Scalar>(params.dy1, m, n);
        dweight1[i] += static_cast<Sum>(dy1 * xhat);
        dbias1[i] += static_cast<Sum>(dy1);
      }
    }
    const Scalar c1 = static_cast<Scalar>(sum1 / static_cast<Sum>(features));
    const Scalar c2 =
        params.is_rms_norm ? Scalar(0) : static_cast<Scalar>(sum2 / static_cast<Sum>(features));
    for (std::int64_t n = 0; n < features; ++n) {
      const Scalar xhat = (at<Scalar>(params.h, m, n) - mean) * rstd;
      Scalar dh = (gradient(n) - xhat * c1 - c2) * rstd;
      if (params.dresidual_out.present()) {
        dh += at<Scalar>(params.dresidual_out, m, n);
      }
      Scalar dx = dh;
      if (branches) {
        dx = factors.apply(dh, m, n);
        if (params.rowscale.present()) {
          dx *= at<Scalar>(params.rowscale, m);
        }
        if (params.dx1.present()) {
          put(params.dx1, m, n, static_cast<double>(factors1.apply(dh, m, n)));
        }
      }
      put(params.dx, m, n, static_cast<double>(dx));
      if (params.dresidual.present()) {
        put(params.dresidual, m, n, static_cast<double>(dh));
      }
    }
  }
  const auto store = [&](const TensorView& to, const std::vector<Sum>& sums) {
    for (std::int64_t n = 0; to.present() && n < features; ++n) {
      put(to, n, static_cast<double>(sums[static_cast<std::size_t>(n)]));
    }
  };
  store(params.dweight, dweight);
  store(params.dbias, dbias);
  store(params.dweight1, dweight1);
  store(params.dbias1, dbias1);
}

template void forward<float, float>(const ForwardParams&);
template void forward<float, double>(const ForwardParams&);
template void forward<double, double>(const ForwardParams&);
template void backward<float, float>(const BackwardParams&);
template void backward<float, double>(const BackwardParams&);
template void backward<double, double>(const BackwardParams&);

}  // namespace mamba_native::layer_norm::reference
