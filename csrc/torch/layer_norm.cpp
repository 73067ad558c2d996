#include "layer_norm/layer_norm.h"

#include <tuple>

#include "binding.h"
#include "box.h"

namespace mamba_native::binding {
namespace {

constexpr char kForward[] = "layer_norm_forward";
constexpr char kBackward[] = "layer_norm_backward";
constexpr char kBranchesForward[] = "layer_norm_branches_forward";
constexpr char kBranchesBackward[] = "layer_norm_branches_backward";

TensorView view_if(bool present, const char* op, const char* argument, const Tensor& tensor) {
  return present ? view(op, argument, tensor) : TensorView();
}

// The part of forward that its two operations share. `changed`: the sum is not x itself.
struct Forward {
  Forward(const char* op, const Tensor& x, const Tensor& weight, const Optional& bias,
          const Optional& residual, bool changed, double eps, bool is_rms_norm,
          bool residual_in_fp32)
      : residual_dtype(residual           ? residual->scalar_type()
                       : residual_in_fp32 ? accumulator_of(x)
                                          : x.scalar_type()),
        stores_residual(changed || residual || residual_dtype != x.scalar_type()),
        y(empty(x, sizes_of(x), x.scalar_type())),
        residual_out(stores_residual ? empty(x, sizes_of(x), residual_dtype)
                                     : nothing(x, residual_dtype)),
        mean(is_rms_norm ? nothing(x, accumulator_of(x))
                         : empty(x, {x.size(0)}, accumulator_of(x))),
        rstd(empty(x, {x.size(0)}, accumulator_of(x))) {
    params.x = view(op, "x", x);
    params.weight = view(op, "weight", weight);
    params.bias = view(op, "bias", bias);
    params.residual = view(op, "residual", residual);
    params.eps = eps;
    params.is_rms_norm = is_rms_norm;
    params.y = view(op, "y", y);
    params.residual_out = view_if(stores_residual, op, "residual_out", residual_out);
    params.mean = view_if(!is_rms_norm, op, "mean", mean);
    params.rstd = view(op, "rstd", rstd);
  }

  Scalar residual_dtype;
  bool stores_residual;
  Tensor y, residual_out, mean, rstd;
  layer_norm::ForwardParams params;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& x, const Tensor& weight,
                                                              const Optional& bias,
                                                              const Optional& residual, double eps,
                                                              bool is_rms_norm,
                                                              bool residual_in_fp32) {
  check_dim(kForward, "x", x, 2);
  const DeviceScope scope(x);
  Forward call(kForward, x, weight, bias, residual, false, eps, is_rms_norm, residual_in_fp32);
  call.params.stream = scope.stream();
  layer_norm::forward(call.params);
  return {call.y, call.residual_out, call.mean, call.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_branches_forward(
    const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& residual,
    const Optional& x1, const Optional& weight1, const Optional& bias1, const Optional& rowscale,
    const Optional& seed, double dropout_p, double eps, bool is_rms_norm, bool residual_in_fp32,
    bool return_dropout_mask) {
  constexpr const char* kOp = kBranchesForward;
  check_dim(kOp, "x", x, 2);
  const DeviceScope scope(x);
  const bool changed = x1 || rowscale || dropout_p > 0.0;
  const bool has_mask = return_dropout_mask && dropout_p > 0.0;
  Forward call(kOp, x, weight, bias, residual, changed, eps, is_rms_norm, residual_in_fp32);
  Tensor y1 = weight1 ? empty(x, sizes_of(x), x.scalar_type()) : nothing(x, x.scalar_type());
  Tensor mask = has_mask ? empty(x, sizes_of(x), Scalar::Bool) : nothing(x, Scalar::Bool);
  Tensor mask1 = has_mask && x1 ? empty(x, sizes_of(x), Scalar::Bool) : nothing(x, Scalar::Bool);
  layer_norm::ForwardParams& params = call.params;
  params.x1 = view(kOp, "x1", x1);
  params.weight1 = view(kOp, "weight1", weight1);
  params.bias1 = view(kOp, "bias1", bias1);
  params.rowscale = view(kOp, "rowscale", rowscale);
  params.dropout.p = dropout_p;
  params.dropout.seed = view(kOp, "seed", seed);
  params.y1 = view_if(weight1.has_value(), kOp, "y1", y1);
  if (has_mask) {
    params.mask = static_cast<std::uint8_t*>(mask.data_ptr());
    params.mask1 = x1 ? static_cast<std::uint8_t*>(mask1.data_ptr()) : nullptr;
  }
  params.stream = scope.stream();
  layer_norm::forward(params);
  return {call.y, y1, call.residual_out, call.mean, call.rstd, mask, mask1};
}

// The part of backward that its two operations share.
struct Backward {
  Backward(const char* op, const Tensor& dy, const Optional& dresidual_out, const Tensor& h,
           const Tensor& weight, const Optional& bias, const Tensor& mean, const Tensor& rstd,
           Scalar x_dtype, bool stores_residual, bool is_rms_norm, std::int64_t sums)
      : dx(empty(h, sizes_of(h), x_dtype)),
        dresidual(stores_residual ? empty(h, sizes_of(h), h.scalar_type()) : nothing(h, x_dtype)),
        dweight(empty(h, {h.size(1)}, accumulator_of(h))),
        dbias(bias ? empty(h, {h.size(1)}, accumulator_of(h)) : nothing(h, accumulator_of(h))),
        workspace(empty(
            h, {layer_norm::workspace_rows(h.size(0), view(op, "h", h).device), sums, h.size(1)},
            Scalar::Float)) {
    params.dy = view(op, "dy", dy);
    params.dresidual_out = view(op, "dresidual_out", dresidual_out);
    params.h = view(op, "h", h);
    params.weight = view(op, "weight", weight);
    params.mean = view_if(!is_rms_norm, op, "mean", mean);
    params.rstd = view(op, "rstd", rstd);
    params.is_rms_norm = is_rms_norm;
    params.dx = view(op, "dx", dx);
    params.dresidual = view_if(stores_residual, op, "dresidual", dresidual);
    params.dweight = view(op, "dweight", dweight);
    params.dbias = view_if(bias.has_value(), op, "dbias", dbias);
    params.workspace = view(op, "workspace", workspace);
  }

  Tensor dx, dresidual, dweight, dbias, workspace;
  layer_norm::BackwardParams params;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_backward(
    const Tensor& dy, const Optional& dresidual_out, const Tensor& h, const Tensor& weight,
    const Optional& bias, const Tensor& mean, const Tensor& rstd, Scalar x_dtype,
    bool is_rms_norm) {
  check_dim(kBackward, "h", h, 2);
  const DeviceScope scope(h);
  Backward call(kBackward, dy, dresidual_out, h, weight, bias, mean, rstd, x_dtype,
                h.scalar_type() != x_dtype, is_rms_norm, 2);
  call.params.stream = scope.stream();
  layer_norm::backward(call.params);
  return {call.dx, call.dresidual, to_dtype(call.dweight, weight.scalar_type()),
          to_dtype(call.dbias, weight.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_branches_backward(
    const Tensor& dy, const Optional& dy1, const Optional& dresidual_out, const Tensor& h,
    const Tensor& weight, const Optional& bias, const Optional& weight1, const Optional& bias1,
    const Optional& rowscale, const Optional& seed, double dropout_p, const Tensor& mean,
    const Tensor& rstd, Scalar x_dtype, std::optional<Scalar> x1_dtype, bool has_residual,
    bool is_rms_norm) {
  constexpr const char* kOp = kBranchesBackward;
  check_dim(kOp, "h", h, 2);
  const DeviceScope scope(h);
  const Scalar sum = accumulator_of(h);
  const std::int64_t features = h.size(1);
  Backward call(kOp, dy, dresidual_out, h, weight, bias, mean, rstd, x_dtype, has_residual,
                is_rms_norm, weight1 ? 4 : 2);
  Tensor dx1 = x1_dtype ? empty(h, sizes_of(h), *x1_dtype) : nothing(h, x_dtype);
  Tensor dweight1 = weight1 ? empty(h, {features}, sum) : nothing(h, sum);
  Tensor dbias1 = bias1 ? empty(h, {features}, sum) : nothing(h, sum);
  layer_norm::BackwardParams& params = call.params;
  params.dy1 = view(kOp, "dy1", dy1);
  params.weight1 = view(kOp, "weight1", weight1);
  params.rowscale = view(kOp, "rowscale", rowscale);
  params.dropout.p = dropout_p;
  params.dropout.seed = view(kOp, "seed", seed);
  params.dx1 = view_if(x1_dtype.has_value(), kOp, "dx1", dx1);
  params.dweight1 = view_if(weight1.has_value(), kOp, "dweight1", dweight1);
  params.dbias1 = view_if(bias1.has_value(), kOp, "dbias1", dbias1);
  params.stream = scope.stream();
  layer_norm::backward(params);
  const Scalar dtype = weight.scalar_type();
  const Scalar dtype1 = weight1 ? weight1->scalar_type() : dtype;
  return {call.dx,
          dx1,
          call.dresidual,
          to_dtype(call.dweight, dtype),
          to_dtype(call.dbias, dtype),
          to_dtype(dweight1, dtype1),
          to_dtype(dbias1, dtype1)};
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
  m.def(
      "layer_norm_branches_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, "
      "Tensor? x1, Tensor? weight1, Tensor? bias1, Tensor? rowscale, Tensor? seed, "
      "float dropout_p, float eps, bool is_rms_norm, bool residual_in_fp32, "
      "bool return_dropout_mask) "
      "-> (Tensor y, Tensor y1, Tensor residual_out, Tensor mean, Tensor rstd, Tensor mask, "
      "Tensor mask1)");
  m.def(
      "layer_norm_branches_backward(Tensor dy, Tensor? dy1, Tensor? dresidual_out, Tensor h, "
      "Tensor weight, Tensor? bias, Tensor? weight1, Tensor? bias1, Tensor? rowscale, "
      "Tensor? seed, float dropout_p, Tensor mean, Tensor rstd, ScalarType x_dtype, "
      "ScalarType? x1_dtype, bool has_residual, bool is_rms_norm) "
      "-> (Tensor dx, Tensor dx1, Tensor dresidual, Tensor dweight, Tensor dbias, "
      "Tensor dweight1, Tensor dbias1)");
}

STABLE_TORCH_LIBRARY_IMPL(mamba_native, CPU, m) {
  m.impl("layer_norm_forward", MAMBA_BOX(&mamba_native::binding::layer_norm_forward));
  m.impl("layer_norm_backward", MAMBA_BOX(&mamba_native::binding::layer_norm_backward));
  m.impl("layer_norm_branches_forward",
         MAMBA_BOX(&mamba_native::binding::layer_norm_branches_forward));
  m.impl("layer_norm_branches_backward",
         MAMBA_BOX(&mamba_native::binding::layer_norm_branches_backward));
}

#if MAMBA_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mamba_native, CUDA, m) {
  m.impl("layer_norm_forward", MAMBA_BOX(&mamba_native::binding::layer_norm_forward));
  m.impl("layer_norm_backward", MAMBA_BOX(&mamba_native::binding::layer_norm_backward));
  m.impl("layer_norm_branches_forward",
         MAMBA_BOX(&mamba_native::binding::layer_norm_branches_forward));
  m.impl("layer_norm_branches_backward",
         MAMBA_BOX(&mamba_native::binding::layer_norm_branches_backward));
}
#endif
