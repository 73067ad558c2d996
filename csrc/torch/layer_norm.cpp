#include "layer_norm/layer_norm.h"

#include <tuple>

#include "binding.h"
#include "box.h"

namespace mamba_native::binding {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& x, const Tensor& weight,
                                                              const Optional& bias,
                                                              const Optional& residual, double eps,
                                                              bool is_rms_norm,
                                                              bool residual_in_fp32) {
  constexpr char kOp[] = "layer_norm_forward";
  check_dim(kOp, "x", x, 2);
  const DeviceScope scope(x);
  const Scalar dtype = x.scalar_type();
  const Scalar statistics = accumulator_of(x);
  const Scalar residual_dtype = residual           ? residual->scalar_type()
                                : residual_in_fp32 ? statistics
                                                   : dtype;
  const bool stores_residual = residual || residual_dtype != dtype;
  const std::int64_t rows = x.size(0);
  Tensor y = empty(x, sizes_of(x), dtype);
  Tensor residual_out =
      stores_residual ? empty(x, sizes_of(x), residual_dtype) : nothing(x, residual_dtype);
  Tensor mean = is_rms_norm ? nothing(x, statistics) : empty(x, {rows}, statistics);
  Tensor rstd = empty(x, {rows}, statistics);
  layer_norm::ForwardParams params;
  params.x = view(kOp, "x", x);
  params.weight = view(kOp, "weight", weight);
  params.bias = view(kOp, "bias", bias);
  params.residual = view(kOp, "residual", residual);
  params.eps = eps;
  params.is_rms_norm = is_rms_norm;
  params.y = view(kOp, "y", y);
  params.residual_out = stores_residual ? view(kOp, "residual_out", residual_out) : TensorView();
  params.mean = is_rms_norm ? TensorView() : view(kOp, "mean", mean);
  params.rstd = view(kOp, "rstd", rstd);
  params.stream = scope.stream();
  layer_norm::forward(params);
  return {y, residual_out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_backward(
    const Tensor& dy, const Optional& dresidual_out, const Tensor& h, const Tensor& weight,
    const Optional& bias, const Tensor& mean, const Tensor& rstd, Scalar x_dtype,
    bool is_rms_norm) {
  constexpr char kOp[] = "layer_norm_backward";
  check_dim(kOp, "h", h, 2);
  const DeviceScope scope(h);
  const Scalar sum = accumulator_of(h);
  const bool stores_residual = h.scalar_type() != x_dtype;
  const std::int64_t features = h.size(1);
  Tensor dx = empty(h, sizes_of(h), x_dtype);
  Tensor dresidual = stores_residual ? empty(h, sizes_of(h), h.scalar_type()) : nothing(h, x_dtype);
  Tensor dweight = empty(h, {features}, sum);
  Tensor dbias = bias ? empty(h, {features}, sum) : nothing(h, sum);
  layer_norm::BackwardParams params;
  params.dy = view(kOp, "dy", dy);
  params.dresidual_out = view(kOp, "dresidual_out", dresidual_out);
  params.h = view(kOp, "h", h);
  params.weight = view(kOp, "weight", weight);
  params.mean = is_rms_norm ? TensorView() : view(kOp, "mean", mean);
  params.rstd = view(kOp, "rstd", rstd);
  params.is_rms_norm = is_rms_norm;
  params.dx = view(kOp, "dx", dx);
  params.dresidual = stores_residual ? view(kOp, "dresidual", dresidual) : TensorView();
  params.dweight = view(kOp, "dweight", dweight);
  params.dbias = bias ? view(kOp, "dbias", dbias) : TensorView();
  Tensor workspace = empty(h, {layer_norm::workspace_rows(h.size(0), params.h.device), 2, features},
                           Scalar::Float);
  params.workspace = view(kOp, "workspace", workspace);
  params.stream = scope.stream();
  layer_norm::backward(params);
  return {dx, dresidual, to_dtype(dweight, weight.scalar_type()),
          to_dtype(dbias, weight.scalar_type())};
}

}  // namespace
}  // namespace mamba_native::binding

STABLE_TORCH_LIBRARY_FRAGMENT(mamba_native, m) {
  m.def(
      "layer_norm_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float eps, "
      "bool is_rms_norm, bool residual_in_fp32) "
      "-> (Tensor y, Tensor residual_out, Tensor mean, Tensor rstd)");
  m.def(
      "layer_norm_backward(Tensor dy, Tensor? dresidual_out, Tensor h, Tensor weight, Tensor? "
      "bias, "
      "Tensor mean, Tensor rstd, ScalarType x_dtype, bool is_rms_norm) "
      "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)");
}

STABLE_TORCH_LIBRARY_IMPL(mamba_native, CPU, m) {
  m.impl("layer_norm_forward", MAMBA_BOX(&mamba_native::binding::layer_norm_forward));
  m.impl("layer_norm_backward", MAMBA_BOX(&mamba_native::binding::layer_norm_backward));
}

#if MAMBA_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mamba_native, CUDA, m) {
  m.impl("layer_norm_forward", MAMBA_BOX(&mamba_native::binding::layer_norm_forward));
  m.impl("layer_norm_backward", MAMBA_BOX(&mamba_native::binding::layer_norm_backward));
}
#endif
