#include "gated_norm/gated_norm.h"

#include <tuple>

#include "binding.h"
#include "box.h"

namespace mamba_native::binding {
namespace {

constexpr char kForward[] = "gated_norm_forward";
constexpr char kBackward[] = "gated_norm_backward";

std::tuple<Tensor, Tensor, Tensor> gated_norm_forward(const Tensor& x, const Tensor& weight,
                                                      const Optional& bias, const Optional& z,
                                                      double eps, std::int64_t group_size,
                                                      bool norm_before_gate, bool is_rms_norm) {
  check_dim(kForward, "x", x, 2);
  const Sizes statistics = {gated_norm::groups_of(kForward, x.size(1), group_size), x.size(0)};
  const DeviceScope scope(x);
  Tensor y = empty(x, sizes_of(x), x.scalar_type());
  Tensor mean =
      is_rms_norm ? nothing(x, accumulator_of(x)) : empty(x, statistics, accumulator_of(x));
  Tensor rstd = empty(x, statistics, accumulator_of(x));
  gated_norm::ForwardParams params;
  params.x = view(kForward, "x", x);
  params.weight = view(kForward, "weight", weight);
  params.bias = view(kForward, "bias", bias);
  params.z = view(kForward, "z", z);
  params.eps = eps;
  params.group_size = group_size;
  params.norm_before_gate = norm_before_gate;
  params.is_rms_norm = is_rms_norm;
  params.y = view(kForward, "y", y);
  params.mean = is_rms_norm ? TensorView() : view(kForward, "mean", mean);
  params.rstd = view(kForward, "rstd", rstd);
  params.stream = scope.stream();
  gated_norm::forward(params);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_norm_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Optional& bias,
    const Optional& z, const Tensor& mean, const Tensor& rstd, std::int64_t group_size,
    bool norm_before_gate, bool is_rms_norm, bool recompute_output) {
  check_dim(kBackward, "x", x, 2);
  const std::int64_t groups = gated_norm::groups_of(kBackward, x.size(1), group_size);
  const DeviceScope scope(x);
  const Scalar sum = accumulator_of(x);
  gated_norm::BackwardParams params;
  params.x = view(kBackward, "x", x);
  Tensor dx = empty(x, sizes_of(x), x.scalar_type());
  Tensor dz = z ? empty(x, sizes_of(x), z->scalar_type()) : nothing(x, x.scalar_type());
  Tensor dweight = empty(x, {x.size(1)}, sum);
  Tensor dbias = bias ? empty(x, {x.size(1)}, sum) : nothing(x, sum);
  Tensor y =
      recompute_output ? empty(x, sizes_of(x), x.scalar_type()) : nothing(x, x.scalar_type());
  Tensor workspace =
      empty(x, {gated_norm::workspace_rows(x.size(0), groups, params.x.device), 2, x.size(1)},
            Scalar::Float);
  params.dy = view(kBackward, "dy", dy);
  params.weight = view(kBackward, "weight", weight);
  params.bias = view(kBackward, "bias", bias);
  params.z = view(kBackward, "z", z);
  params.mean = is_rms_norm ? TensorView() : view(kBackward, "mean", mean);
  params.rstd = view(kBackward, "rstd", rstd);
  params.group_size = group_size;
  params.norm_before_gate = norm_before_gate;
  params.is_rms_norm = is_rms_norm;
  params.dx = view(kBackward, "dx", dx);
  params.dz = z ? view(kBackward, "dz", dz) : TensorView();
  params.dweight = view(kBackward, "dweight", dweight);
  params.dbias = bias ? view(kBackward, "dbias", dbias) : TensorView();
  params.y = recompute_output ? view(kBackward, "y", y) : TensorView();
  params.workspace = view(kBackward, "workspace", workspace);
  params.stream = scope.stream();
  gated_norm::backward(params);
  const Scalar dtype = weight.scalar_type();
  return {dx, to_dtype(dweight, dtype), to_dtype(dbias, bias ? bias->scalar_type() : dtype), dz, y};
}

}  // namespace
}  // namespace mamba_native::binding

STABLE_TORCH_LIBRARY_FRAGMENT(mamba_native, m) {
  m.def(
      "gated_norm_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? z, float eps, "
      "int group_size, bool norm_before_gate, bool is_rms_norm) "
      "-> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "gated_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? z, "
      "Tensor mean, Tensor rstd, int group_size, bool norm_before_gate, bool is_rms_norm, "
      "bool recompute_output) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dz, Tensor y)");
}

STABLE_TORCH_LIBRARY_IMPL(mamba_native, CPU, m) {
  m.impl("gated_norm_forward", MAMBA_BOX(&mamba_native::binding::gated_norm_forward));
  m.impl("gated_norm_backward", MAMBA_BOX(&mamba_native::binding::gated_norm_backward));
}

#if MAMBA_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mamba_native, CUDA, m) {
  m.impl("gated_norm_forward", MAMBA_BOX(&mamba_native::binding::gated_norm_forward));
  m.impl("gated_norm_backward", MAMBA_BOX(&mamba_native::binding::gated_norm_backward));
}
#endif
