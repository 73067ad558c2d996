#include "layer_norm/layer_norm.h"

#include "core/error.h"
#include "layer_norm/cpu.h"
#include "layer_norm/reference.h"
#if MAMBA_WITH_CUDA
#include "layer_norm/plan.h"
#endif

namespace mamba_native::layer_norm {
namespace {

constexpr char kForward[] = "layer_norm_forward";
constexpr char kBackward[] = "layer_norm_backward";

// What all tensors of a call have in common.
struct Call {
  const char* op;
  Device device;
  bool is_double;

  DType statistics() const { return is_double ? DType::f64 : DType::f32; }
};

void check_input(const Call& call, const char* argument, const TensorView& tensor,
                 std::initializer_list<std::int64_t> shape) {
  check_shape(call.op, argument, tensor, shape);
  check_float(call.op, argument, tensor);
  check_device(call.op, argument, tensor, call.device);
  MAMBA_CHECK((tensor.dtype == DType::f64) == call.is_double, call.op, ": ", argument,
              " must be float64 exactly when the others are, got ", describe(tensor));
}

void check_output(const Call& call, const char* argument, const TensorView& tensor,
                  std::initializer_list<std::int64_t> shape, DType dtype) {
  check_shape(call.op, argument, tensor, shape);
  check_dtype(call.op, argument, tensor, dtype);
  check_float(call.op, argument, tensor);
  check_device(call.op, argument, tensor, call.device);
  for (int i = 0; i < tensor.dim && tensor.numel() > 0; ++i) {
    MAMBA_CHECK(tensor.size[i] <= 1 || tensor.stride[i] != 0, call.op, ": ", argument,
                " is written, so it cannot be an expanded view (stride 0 in dimension ", i,
                "), got ", describe(tensor));
  }
}

void check_contiguous(const Call& call, const char* argument, const TensorView& tensor) {
  MAMBA_CHECK(tensor.is_contiguous(), call.op, ": ", argument, " must be contiguous, got ",
              describe(tensor));
}

void check_statistics(const Call& call, const char* argument, const TensorView& tensor,
                      std::int64_t rows) {
  check_output(call, argument, tensor, {rows}, call.statistics());
  check_contiguous(call, argument, tensor);
}

void check_rows(const char* op, const char* argument, const TensorView& tensor) {
  MAMBA_CHECK(tensor.dim == 2 && tensor.size[1] > 0, op, ": ", argument,
              " must have shape (rows, features) with at least one feature, got ",
              describe(tensor));
}

void check_affine(const Call& call, const char* weight_name, const TensorView& weight,
                  const char* bias_name, const TensorView& bias, std::int64_t features) {
  check_input(call, weight_name, weight, {features});
  if (bias.present()) {
    check_input(call, bias_name, bias, {features});
    check_dtype(call.op, bias_name, bias, weight.dtype);
  }
}

void check_dropout(const Call& call, const DropoutParams& dropout) {
  MAMBA_CHECK(dropout.p >= 0.0 && dropout.p <= 1.0, call.op,
              ": dropout_p must be from 0 to 1, got ", dropout.p);
  MAMBA_CHECK(dropout.seed.present() == (dropout.p > 0.0), call.op,
              ": seed must be given with a dropout_p above 0, and only then");
  if (dropout.seed.present()) {
    check_shape(call.op, "seed", dropout.seed, {1});
    check_dtype(call.op, "seed", dropout.seed, DType::i64);
    check_device(call.op, "seed", dropout.seed, call.device);
  }
}

void validate(const ForwardParams& p) {
  check_rows(kForward, "x", p.x);
  const Call call{kForward, p.x.device, p.x.dtype == DType::f64};
  const std::int64_t rows = p.x.size[0];
  const std::int64_t features = p.x.size[1];
  check_input(call, "x", p.x, {rows, features});
  check_affine(call, "weight", p.weight, "bias", p.bias, features);
  if (p.residual.present()) {
    check_input(call, "residual", p.residual, {rows, features});
  }
  if (p.x1.present()) {
    check_input(call, "x1", p.x1, {rows, features});
  }
  MAMBA_CHECK(p.weight1.present() || !p.bias1.present(), kForward,
              ": bias1 needs weight1, which asks for the second output");
  MAMBA_CHECK(p.weight1.present() == p.y1.present(), kForward,
              ": y1 is an output with weight1 and none without");
  if (p.weight1.present()) {
    check_affine(call, "weight1", p.weight1, "bias1", p.bias1, features);
    check_output(call, "y1", p.y1, {rows, features}, p.x.dtype);
  }
  if (p.rowscale.present()) {
    check_input(call, "rowscale", p.rowscale, {rows});
  }
  check_dropout(call, p.dropout);
  MAMBA_CHECK((p.mask == nullptr && p.mask1 == nullptr) || p.dropout.p > 0.0, kForward,
              ": mask and mask1 are outputs of dropout, and dropout_p is 0");
  MAMBA_CHECK(p.mask1 == nullptr || p.x1.present(), kForward, ": mask1 is an output with x1");
  check_output(call, "y", p.y, {rows, features}, p.x.dtype);
  if (p.residual_out.present()) {
    check_output(call, "residual_out", p.residual_out, {rows, features}, p.residual_out.dtype);
    MAMBA_CHECK((p.residual_out.dtype == DType::f64) == call.is_double, kForward,
                ": residual_out must be float64 exactly when x is, got ", describe(p.residual_out));
  }
  MAMBA_CHECK(p.mean.present() != p.is_rms_norm, kForward,
              ": mean is an output of LayerNorm and none of RMSNorm");
  if (p.mean.present()) {
    check_statistics(call, "mean", p.mean, rows);
  }
  check_statistics(call, "rstd", p.rstd, rows);
}

void validate(const BackwardParams& p) {
  check_rows(kBackward, "h", p.h);
  const Call call{kBackward, p.h.device, p.h.dtype == DType::f64};
  const std::int64_t rows = p.h.size[0];
  const std::int64_t features = p.h.size[1];
  check_input(call, "h", p.h, {rows, features});
  check_input(call, "dy", p.dy, {rows, features});
  if (p.dresidual_out.present()) {
    check_input(call, "dresidual_out", p.dresidual_out, {rows, features});
    check_dtype(kBackward, "dresidual_out", p.dresidual_out, p.h.dtype);
  }
  check_input(call, "weight", p.weight, {features});
  MAMBA_CHECK(p.weight1.present() == p.dy1.present(), kBackward,
              ": dy1 is an input with weight1 and none without");
  MAMBA_CHECK(p.weight1.present() == p.dweight1.present(), kBackward,
              ": dweight1 is an output with weight1 and none without");
  if (p.weight1.present()) {
    check_input(call, "weight1", p.weight1, {features});
    check_input(call, "dy1", p.dy1, {rows, features});
    check_dtype(kBackward, "dy1", p.dy1, p.dy.dtype);
    check_statistics(call, "dweight1", p.dweight1, features);
  }
  if (p.dbias1.present()) {
    MAMBA_CHECK(p.weight1.present(), kBackward, ": dbias1 is an output with weight1");
    check_statistics(call, "dbias1", p.dbias1, features);
  }
  if (p.rowscale.present()) {
    check_input(call, "rowscale", p.rowscale, {rows});
  }
  check_dropout(call, p.dropout);
  MAMBA_CHECK(p.mean.present() != p.is_rms_norm, kBackward,
              ": mean is an input of LayerNorm and none of RMSNorm");
  if (p.mean.present()) {
    check_statistics(call, "mean", p.mean, rows);
  }
  check_statistics(call, "rstd", p.rstd, rows);
  check_output(call, "dx", p.dx, {rows, features}, p.dy.dtype);
  if (p.dx1.present()) {
    check_output(call, "dx1", p.dx1, {rows, features}, p.dx1.dtype);
    MAMBA_CHECK((p.dx1.dtype == DType::f64) == call.is_double, kBackward,
                ": dx1 must be float64 exactly when h is, got ", describe(p.dx1));
  }
  if (p.dresidual.present()) {
    check_output(call, "dresidual", p.dresidual, {rows, features}, p.h.dtype);
  }
  check_statistics(call, "dweight", p.dweight, features);
  if (p.dbias.present()) {
    check_statistics(call, "dbias", p.dbias, features);
  }
  check_shape(kBackward, "workspace", p.workspace,
              {workspace_rows(rows, call.device), p.weight1.present() ? 4 : 2, features});
  check_dtype(kBackward, "workspace", p.workspace, DType::f32);
  check_device(kBackward, "workspace", p.workspace, call.device);
  check_contiguous(call, "workspace", p.workspace);
}

}  // namespace

std::int64_t workspace_rows(std::int64_t rows, Device device) {
  if (!device.is_cuda()) {
    return cpu::blocks(rows);
  }
#if MAMBA_WITH_CUDA
  return cuda::workspace_rows(rows, mamba_native::cuda::device_info(device.index));
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
  if (params.h.dtype == DType::f64) {
    reference::backward<double>(params);
    return;
  }
  if (!params.h.device.is_cuda()) {
    cpu::backward(params);
    return;
  }
#if MAMBA_WITH_CUDA
  cuda::backward(params, cuda::choose_backward(params));
#endif
}

}  // namespace mamba_native::layer_norm
