#include "causal_conv1d/causal_conv1d.h"

#include "causal_conv1d/cpu.h"
#include "causal_conv1d/plan.h"
#include "causal_conv1d/reference.h"
#include "core/error.h"

namespace mamba_native::causal_conv1d {
namespace {

constexpr char kForward[] = "causal_conv1d_forward";
constexpr char kBackward[] = "causal_conv1d_backward";
constexpr char kUpdate[] = "causal_conv1d_update";
constexpr char kVarlenStates[] = "causal_conv1d_varlen_states";

// A written tensor must have an address of its own for every element.
void check_written(const char* op, const char* argument, const TensorView& tensor) {
  for (int i = 0; i < tensor.dim && tensor.numel() > 0; ++i) {
    MAMBA_CHECK(tensor.size[i] <= 1 || tensor.stride[i] != 0, op, ": ", argument,
                " is written, so it cannot be an expanded view (stride 0 in dimension ", i,
                "); pass a contiguous copy, got ", describe(tensor));
  }
}

// A tensor of x's dtype on x's device.
void check_like(const char* op, const char* argument, const TensorView& tensor, const TensorView& x,
                std::initializer_list<std::int64_t> shape) {
  check_shape(op, argument, tensor, shape);
  check_dtype(op, argument, tensor, x.dtype);
  check_device(op, argument, tensor, x.device);
}

void check_index(const char* op, const char* argument, const TensorView& tensor,
                 const TensorView& x, std::initializer_list<std::int64_t> shape) {
  check_shape(op, argument, tensor, shape);
  check_dtype(op, argument, tensor, DType::i32);
  check_device(op, argument, tensor, x.device);
}

void check_x(const char* op, const TensorView& x) {
  MAMBA_CHECK(x.dim == 3, op, ": x must have shape (batch, dim, length), got ", describe(x));
  check_float(op, "x", x);
}

// weight (D, W) and bias (D).
void check_weights(const char* op, const TensorView& x, const TensorView& weight,
                   const TensorView& bias) {
  MAMBA_CHECK(weight.dim == 2 && weight.size[1] >= kMinWidth && weight.size[1] <= kMaxWidth, op,
              ": weight must have shape (dim, width) with a width between ", kMinWidth, " and ",
              kMaxWidth, ", got ", describe(weight));
  check_shape(op, "weight", weight, {x.size[1], weight.size[1]});
  check_float(op, "weight", weight);
  check_device(op, "weight", weight, x.device);
  MAMBA_CHECK((weight.dtype == DType::f64) == (x.dtype == DType::f64), op,
              ": weight must be float64 exactly when x is, got ", describe(weight), " and x ",
              describe(x));
  if (bias.present()) {
    check_shape(op, "bias", bias, {x.size[1]});
    check_dtype(op, "bias", bias, weight.dtype);
    check_device(op, "bias", bias, x.device);
  }
}

void check_inputs(const char* op, const Inputs& in) {
  check_x(op, in.x);
  check_weights(op, in.x, in.weight, in.bias);
  if (in.seq_idx.present()) {
    check_index(op, "seq_idx", in.seq_idx, in.x, {in.x.size[0], in.x.size[2]});
  }
  if (in.initial_states.present()) {
    check_like(op, "initial_states", in.initial_states, in.x,
               {in.x.size[0], in.x.size[1], in.weight.size[1] - 1});
  }
}

void validate(const ForwardParams& p) {
  const TensorView& x = p.in.x;
  check_inputs(kForward, p.in);
  check_like(kForward, "out", p.out, x, {x.size[0], x.size[1], x.size[2]});
  check_written(kForward, "out", p.out);
  if (p.final_states.present()) {
    check_like(kForward, "final_states", p.final_states, x,
               {x.size[0], x.size[1], p.in.weight.size[1] - 1});
    check_written(kForward, "final_states", p.final_states);
  }
}

// A gradient summed in float32, or in float64 where everything is.
void check_sum(const char* argument, const TensorView& sum, const TensorView& x) {
  check_dtype(kBackward, argument, sum, x.dtype == DType::f64 ? DType::f64 : DType::f32);
  check_device(kBackward, argument, sum, x.device);
  MAMBA_CHECK(sum.is_contiguous(), kBackward, ": ", argument, " must be contiguous, got ",
              describe(sum));
}

void validate(const BackwardParams& p) {
  const TensorView& x = p.in.x;
  const std::int64_t width = p.in.weight.size[1];
  check_inputs(kBackward, p.in);
  check_like(kBackward, "dout", p.dout, x, {x.size[0], x.size[1], x.size[2]});
  check_like(kBackward, "dx", p.dx, x, {x.size[0], x.size[1], x.size[2]});
  check_written(kBackward, "dx", p.dx);
  check_shape(kBackward, "dweight", p.dweight, {x.size[1], width});
  check_sum("dweight", p.dweight, x);
  MAMBA_CHECK(p.dbias.present() == p.in.bias.present(), kBackward,
              ": dbias must be given exactly when bias is");
  if (p.dbias.present()) {
    check_shape(kBackward, "dbias", p.dbias, {x.size[1]});
    check_sum("dbias", p.dbias, x);
  }
  if (p.dfinal_states.present()) {
    check_like(kBackward, "dfinal_states", p.dfinal_states, x, {x.size[0], x.size[1], width - 1});
  }
  MAMBA_CHECK(p.dinitial_states.present() == p.in.initial_states.present(), kBackward,
              ": dinitial_states must be given exactly when initial_states is");
  if (p.dinitial_states.present()) {
    check_like(kBackward, "dinitial_states", p.dinitial_states, x,
               {x.size[0], x.size[1], width - 1});
    check_written(kBackward, "dinitial_states", p.dinitial_states);
  }
  if (p.workspace.present()) {
    check_shape(kBackward, "workspace", p.workspace, {workspace_rows(p.in), x.size[1], width + 1});
    check_dtype(kBackward, "workspace", p.workspace, DType::f32);
    check_device(kBackward, "workspace", p.workspace, x.device);
    MAMBA_CHECK(p.workspace.is_contiguous(), kBackward, ": workspace must be contiguous, got ",
                describe(p.workspace));
  }
}

// Values of index tensors are looked at on the CPU only: on a device that would mean waiting for
// it, and there the kernel itself stays inside the tensors.
void check_values(const UpdateParams& p) {
  const TensorView& rows = p.conv_state_indices;
  const TensorView& seqlens = p.cache_seqlens;
  for (std::int64_t b = 0; b < p.x.size[0]; ++b) {
    if (rows.present()) {
      const std::int64_t row = load_index(rows.data, rows.dtype, b * rows.stride[0]);
      MAMBA_CHECK(row < p.conv_state.size[0], kUpdate, ": conv_state_indices[", b, "] is ", row,
                  ", but conv_state has ", p.conv_state.size[0], " rows");
    }
    if (seqlens.present()) {
      const std::int64_t length = load_index(seqlens.data, seqlens.dtype, b * seqlens.stride[0]);
      MAMBA_CHECK(length >= 0, kUpdate, ": cache_seqlens[", b, "] must not be negative, got ",
                  length);
    }
  }
}

void validate(const UpdateParams& p) {
  const TensorView& x = p.x;
  const TensorView& state = p.conv_state;
  check_x(kUpdate, x);
  check_weights(kUpdate, x, p.weight, p.bias);
  MAMBA_CHECK(state.dim == 3, kUpdate, ": conv_state must have shape (rows, dim, state_len), got ",
              describe(state));
  MAMBA_CHECK(state.size[2] >= p.weight.size[1] - 1, kUpdate, ": conv_state must hold at least ",
              p.weight.size[1] - 1, " columns (width - 1), got ", describe(state));
  check_like(
      kUpdate, "conv_state", state, x,
      {p.conv_state_indices.present() ? state.size[0] : x.size[0], x.size[1], state.size[2]});
  check_written(kUpdate, "conv_state", state);
  check_like(kUpdate, "out", p.out, x, {x.size[0], x.size[1], x.size[2]});
  check_written(kUpdate, "out", p.out);
  if (p.cache_seqlens.present()) {
    check_index(kUpdate, "cache_seqlens", p.cache_seqlens, x, {x.size[0]});
  }
  if (p.conv_state_indices.present()) {
    check_index(kUpdate, "conv_state_indices", p.conv_state_indices, x, {x.size[0]});
  }
  if (!x.device.is_cuda()) {
    check_values(p);
  }
}

void validate(const VarlenStatesParams& p) {
  const TensorView& cu_seqlens = p.cu_seqlens;
  MAMBA_CHECK(p.x.dim == 2, kVarlenStates, ": x must have shape (tokens, dim), got ",
              describe(p.x));
  check_float(kVarlenStates, "x", p.x);
  MAMBA_CHECK(cu_seqlens.dim == 1 && cu_seqlens.size[0] >= 1 &&
                  (cu_seqlens.dtype == DType::i32 || cu_seqlens.dtype == DType::i64),
              kVarlenStates,
              ": cu_seqlens must have shape (sequences + 1) and be int32 or int64, got ",
              describe(cu_seqlens));
  check_device(kVarlenStates, "cu_seqlens", cu_seqlens, p.x.device);
  MAMBA_CHECK(p.states.dim == 3, kVarlenStates,
              ": states must have shape (sequences, dim, state_len), got ", describe(p.states));
  check_like(kVarlenStates, "states", p.states, p.x,
             {cu_seqlens.size[0] - 1, p.x.size[1], p.states.size[2]});
  check_written(kVarlenStates, "states", p.states);
  std::int64_t before = 0;
  for (std::int64_t s = 0; !p.x.device.is_cuda() && s < cu_seqlens.size[0]; ++s) {
    const std::int64_t at = load_index(cu_seqlens.data, cu_seqlens.dtype, s * cu_seqlens.stride[0]);
    MAMBA_CHECK(at >= before && at <= p.x.size[0], kVarlenStates,
                ": cu_seqlens must rise from 0 to the ", p.x.size[0], " tokens of x, but entry ", s,
                " is ", at, " after ", before);
    before = at;
  }
}

#if !MAMBA_WITH_CUDA
[[noreturn]] void fail_without_cuda(const char* op, const TensorView& x) {
  fail(op, ": x is on ", name(x.device), ", but this library was built without CUDA");
}
#endif

}  // namespace

std::int64_t workspace_rows([[maybe_unused]] const Inputs& in) {
#if MAMBA_WITH_CUDA
  if (in.x.device.is_cuda()) {
    const cuda::Plan plan = cuda::choose_backward(
        in, mamba_native::cuda::device_info(in.x.device.index), /*ordered=*/true);
    return plan.segments * plan.batches;
  }
#endif
  return 0;
}

void forward(const ForwardParams& params) {
  validate(params);
  const TensorView& x = params.in.x;
  if (x.size[0] == 0 || x.size[1] == 0) {
    return;
  }
  if (x.dtype == DType::f64) {
    reference::forward<double>(params);
  } else if (!x.device.is_cuda()) {
    cpu::forward(params);
  } else {
#if MAMBA_WITH_CUDA
    const cuda::Plan plan =
        cuda::choose_forward(params.in, mamba_native::cuda::device_info(x.device.index));
    for_dtype(x.dtype, [&](auto tag) { cuda::forward<decltype(tag)>(params, plan); });
#else
    fail_without_cuda(kForward, x);
#endif
  }
}

void backward(const BackwardParams& params) {
  validate(params);
  const TensorView& x = params.in.x;
  if (x.size[1] == 0) {
    return;
  }
  if (x.dtype == DType::f64) {
    reference::backward<double>(params);
  } else if (!x.device.is_cuda()) {
    cpu::backward(params);
  } else {
#if MAMBA_WITH_CUDA
    const cuda::Plan plan = cuda::choose_backward(
        params.in, mamba_native::cuda::device_info(x.device.index), params.workspace.present());
    for_dtype(x.dtype, [&](auto tag) { cuda::backward<decltype(tag)>(params, plan); });
#else
    fail_without_cuda(kBackward, x);
#endif
  }
}

void update(const UpdateParams& params) {
  validate(params);
  const TensorView& x = params.x;
  if (x.numel() == 0) {
    return;
  }
  if (x.dtype == DType::f64) {
    reference::update<double>(params);
  } else if (!x.device.is_cuda()) {
    cpu::update(params);
  } else {
#if MAMBA_WITH_CUDA
    for_dtype(x.dtype, [&](auto tag) { cuda::update<decltype(tag)>(params); });
#else
    fail_without_cuda(kUpdate, x);
#endif
  }
}

void varlen_states(const VarlenStatesParams& params) {
  validate(params);
  if (params.states.numel() == 0) {
    return;
  }
  if (!params.x.device.is_cuda()) {
    reference::varlen_states(params);
  } else {
#if MAMBA_WITH_CUDA
    cuda::varlen_states(params);
#else
    fail_without_cuda(kVarlenStates, params.x);
#endif
  }
}

}  // namespace mamba_native::causal_conv1d
