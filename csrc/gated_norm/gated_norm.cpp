#include "gated_norm/gated_norm.h"

#include "core/check.h"
#include "core/error.h"
#include "gated_norm/cpu.h"
#include "gated_norm/reference.h"
#if MAMBA_WITH_CUDA
#include "gated_norm/plan.h"
#endif

namespace mamba_native::gated_norm {
namespace {

constexpr char kForward[] = "gated_norm_forward";
constexpr char kBackward[] = "gated_norm_backward";

// What all tensors of a call have in common.
struct Call {
  const char* op;
  Device device;
  DType dtype;  // of x

  DType statistics() const { return dtype == DType::f64 ? DType::f64 : DType::f32; }
};

void check_any_float(const Call& call, const char* argument, const TensorView& tensor,
                     std::initializer_list<std::int64_t> shape) {
  check_shape(call.op, argument, tensor, shape);
  check_float(call.op, argument, tensor);
  check_input(call.op, argument, tensor, call.device, tensor.dtype, shape);
  MAMBA_CHECK((tensor.dtype == DType::f64) == (call.dtype == DType::f64), call.op, ": ", argument,
              " must be float64 exactly when x is, got ", describe(tensor));
}

void check_sums(const Call& call, const char* argument, const TensorView& tensor,
                std::initializer_list<std::int64_t> shape) {
  check_output(call.op, argument, tensor, call.device, call.statistics(), shape);
  check_contiguous(call.op, argument, tensor);
}

// The tensors that forward and backward share; returns what both compare the others with.
template <class Params>
Call check_common(const char* op, const Params& p) {
  MAMBA_CHECK(p.x.dim == 2 && p.x.size[1] > 0, op,
              ": x must have shape (rows, features) with at least one feature, got ",
              describe(p.x));
  const Call call{op, p.x.device, p.x.dtype};
  const std::int64_t rows = p.x.size[0];
  const std::int64_t features = p.x.size[1];
  const std::int64_t groups = groups_of(op, features, p.group_size);
  check_any_float(call, "x", p.x, {rows, features});
  check_any_float(call, "weight", p.weight, {features});
  if (p.bias.present()) {
    check_any_float(call, "bias", p.bias, {features});
  }
  if (p.z.present()) {
    check_any_float(call, "z", p.z, {rows, features});
  }
  MAMBA_CHECK(p.mean.present() != p.is_rms_norm, op,
              ": mean belongs to LayerNorm, and RMSNorm has none");
  check_optional_input(op, "mean", p.mean, call.device, call.statistics(), {groups, rows});
  check_input(op, "rstd", p.rstd, call.device, call.statistics(), {groups, rows});
  return call;
}

void validate(const ForwardParams& p) {
  const Call call = check_common(kForward, p);
  check_output(kForward, "y", p.y, call.device, call.dtype, {p.x.size[0], p.x.size[1]});
  if (p.mean.present()) {
    check_contiguous(kForward, "mean", p.mean);
  }
  check_contiguous(kForward, "rstd", p.rstd);
}

void validate(const BackwardParams& p) {
  const Call call = check_common(kBackward, p);
  const std::int64_t rows = p.x.size[0];
  const std::int64_t features = p.x.size[1];
  check_input(kBackward, "dy", p.dy, call.device, call.dtype, {rows, features});
  check_output(kBackward, "dx", p.dx, call.device, call.dtype, {rows, features});
  check_optional_output(kBackward, "dz", p.dz, "z", p.z, call.device, p.z.dtype, {rows, features});
  check_sums(call, "dweight", p.dweight, {features});
  MAMBA_CHECK(p.dbias.present() == p.bias.present(), kBackward,
              ": dbias must be given exactly when bias is");
  if (p.dbias.present()) {
    check_sums(call, "dbias", p.dbias, {features});
  }
  if (p.y.present()) {
    check_output(kBackward, "y", p.y, call.device, call.dtype, {rows, features});
  }
  check_output(kBackward, "workspace", p.workspace, call.device, DType::f32,
               {workspace_rows(rows, features / p.group_size, call.device), 2, features});
  check_contiguous(kBackward, "workspace", p.workspace);
}

}  // namespace

std::int64_t groups_of(const char* op, std::int64_t features, std::int64_t group_size) {
  MAMBA_CHECK(group_size > 0 && features % group_size == 0, op, ": group_size must divide the ",
              features, " features of x, got ", group_size);
  return features / group_size;
}

std::int64_t workspace_rows(std::int64_t rows, [[maybe_unused]] std::int64_t groups,
                            Device device) {
  if (!device.is_cuda()) {
    return cpu::blocks(rows);
  }
#if MAMBA_WITH_CUDA
  return cuda::workspace_rows(rows, groups, mamba_native::cuda::device_info(device.index));
#else
  fail(kBackward, ": the tensors are on ", name(device),
       ", but this library was built without CUDA");
#endif
}

void forward(const ForwardParams& params) {
  validate(params);
  if (params.x.size[0] == 0) {
    return;
  }
  if (params.x.dtype == DType::f64) {
    reference::forward<double>(params);
    return;
  }
  if (!params.x.device.is_cuda()) {
    cpu::forward(params);
    return;
  }
#if MAMBA_WITH_CUDA
  cuda::forward(params, cuda::choose_forward(params));
#else
  fail(kForward, ": x is on ", name(params.x.device), ", but this library was built without CUDA");
#endif
}

void backward(const BackwardParams& params) {
  validate(params);
  if (params.x.dtype == DType::f64) {
    reference::backward<double>(params);
    return;
  }
  if (!params.x.device.is_cuda()) {
    cpu::backward(params);
    return;
  }
#if MAMBA_WITH_CUDA
  cuda::backward(params, cuda::choose_backward(params));
#endif
}

}  // namespace mamba_native::gated_norm
