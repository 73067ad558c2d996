#include "ssd/ssd.h"

#include "core/check.h"
#include "core/error.h"
#include "core/math.h"
#include "ssd/cpu.h"
#include "ssd/reference.h"
#include "ssd/scan_order.h"
#if MAMBA_WITH_CUDA
#include "core/cuda/copy.h"
#include "ssd/plan.h"
#endif

namespace mamba_native::ssd {
namespace {

struct Sizes {
  std::int64_t batch;
  std::int64_t rows;  // of states: batch, or sequences
  std::int64_t length;
  std::int64_t heads;
  std::int64_t headdim;
  std::int64_t groups;
  std::int64_t states;
  DType dtype;  // of the activations
  DType sum;    // of parameters, states and sums
  Device device;
};

// x's (B, L, H, P) and what shares its shape.
void check_activation(const char* op, const char* argument, const TensorView& tensor,
                      const Sizes& s) {
  check_input(op, argument, tensor, s.device, s.dtype, {s.batch, s.length, s.heads, s.headdim});
}

Sizes check_inputs(const char* op, const Inputs& in) {
  MAMBA_CHECK(in.x.dim == 4, op, ": x must have shape (batch, length, heads, headdim), got ",
              describe(in.x));
  MAMBA_CHECK(in.B.dim == 4, op, ": B must have shape (batch, length, groups, d_state), got ",
              describe(in.B));
  check_float(op, "x", in.x);
  MAMBA_CHECK(in.sequences >= 0, op, ": sequences must be 0 or their number, got ", in.sequences);
  MAMBA_CHECK(in.sequences == 0 || (in.x.size[0] == 1 && in.seq_idx.present()), op,
              ": with sequences, x must have batch 1 and seq_idx must say which sequence a step "
              "belongs to, got x ",
              describe(in.x), in.seq_idx.present() ? "" : " and no seq_idx");
  const Sizes s = {in.x.size[0],
                   in.sequences > 0 ? in.sequences : in.x.size[0],
                   in.x.size[1],
                   in.x.size[2],
                   in.x.size[3],
                   in.B.size[2],
                   in.B.size[3],
                   in.x.dtype,
                   in.x.dtype == DType::f64 ? DType::f64 : DType::f32,
                   in.x.device};
  MAMBA_CHECK(s.headdim > 0, op, ": x must have at least one element per head, got ",
              describe(in.x));
  MAMBA_CHECK(s.states > 0, op, ": B must have at least one state, got ", describe(in.B));
  MAMBA_CHECK(s.groups > 0 && s.heads % s.groups == 0, op, ": the ", s.heads,
              " heads of x cannot be divided into the ", s.groups, " groups of B");
  MAMBA_CHECK(in.dt_min <= in.dt_max, op, ": dt_limit must be (smallest, largest), got (",
              in.dt_min, ", ", in.dt_max, ")");
  const std::initializer_list<std::int64_t> projection = {s.batch, s.length, s.groups, s.states};
  check_activation(op, "x", in.x, s);
  MAMBA_CHECK(in.dt.dtype == s.dtype || in.dt.dtype == s.sum, op, ": dt must be ", name(s.dtype),
              " like x, or ", name(s.sum), ", got ", describe(in.dt));
  check_input(op, "dt", in.dt, s.device, in.dt.dtype, {s.batch, s.length, s.heads});
  check_input(op, "A", in.A, s.device, s.sum, {s.heads});
  check_input(op, "B", in.B, s.device, s.dtype, projection);
  check_input(op, "C", in.C, s.device, s.dtype, projection);
  if (in.D.dim == 2) {
    check_input(op, "D", in.D, s.device, s.sum, {s.heads, s.headdim});
  } else {
    check_optional_input(op, "D", in.D, s.device, s.sum, {s.heads});
  }
  if (in.z.present()) {
    check_activation(op, "z", in.z, s);
  }
  check_optional_input(op, "dt_bias", in.dt_bias, s.device, s.sum, {s.heads});
  check_optional_input(op, "initial_states", in.initial_states, s.device, s.sum,
                       {s.rows, s.heads, s.headdim, s.states});
  check_optional_input(op, "seq_idx", in.seq_idx, s.device, DType::i32, {s.batch, s.length});
  return s;
}

#if MAMBA_WITH_CUDA
struct CudaForward {
  const ForwardParams& params;
  template <class T>
  void operator()(T) const {
    cuda::forward<T>(params);
  }
};

struct CudaBackward {
  const BackwardParams& params;
  template <class T>
  void operator()(T) const {
    cuda::backward<T>(params);
  }
};

bool has_steps(const Sizes& s) { return s.batch > 0 && s.length > 0 && s.heads > 0; }

void forward_on_cuda(const ForwardParams& params, const Sizes& s) {
  if (params.in.sequences > 0 || !has_steps(s)) {  // sequences without steps
    mamba_native::cuda::copy_or_zero(params.last_states, params.in.initial_states, params.stream);
  }
  if (has_steps(s)) {
    for_dtype(s.dtype, CudaForward{in_scan_order(params)});
  }
}

void backward_on_cuda(const BackwardParams& params, const Sizes& s) {
  if (params.in.sequences > 0 || !has_steps(s)) {
    mamba_native::cuda::copy_or_zero(params.dinitial_states, params.dlast_states, params.stream);
  }
  if (has_steps(s)) {
    for_dtype(s.dtype, CudaBackward{in_scan_order(params)});
    return;
  }
  for (const TensorView* sums :
       {&params.dA, &params.dB, &params.dC, &params.dD, &params.ddt_bias}) {
    mamba_native::cuda::copy_or_zero(*sums, TensorView(), params.stream);
  }
}
#else
[[noreturn]] void fail_without_cuda(const char* op) {
  fail(op,
       ": the tensors are on a CUDA device, but this library was built without CUDA; build it with "
       "-DMAMBA_CUDA=ON");
}
#endif

void check_workspace(const char* op, const TensorView& workspace, std::int64_t size,
                     const Device& device) {
  if (size == 0) {
    return;
  }
  check_output(op, "workspace", workspace, device, DType::f32, {size});
  check_contiguous(op, "workspace", workspace);
  MAMBA_CHECK(reinterpret_cast<std::uintptr_t>(workspace.data) % 16 == 0, op,
              ": workspace must be aligned to 16 bytes");
}

}  // namespace

std::int64_t forward_workspace(const Inputs& in) {
  const Sizes s = check_inputs("ssd_forward", in);
#if MAMBA_WITH_CUDA
  if (s.device.is_cuda() && has_steps(s)) {
    return plan_forward(in).size;
  }
#else
  static_cast<void>(s);
#endif
  return 0;
}

void forward(const ForwardParams& params) {
  constexpr char kOp[] = "ssd_forward";
  const Sizes s = check_inputs(kOp, params.in);
  check_output(kOp, "out", params.out, s.device, s.dtype, {s.batch, s.length, s.heads, s.headdim});
  check_output(kOp, "last_states", params.last_states, s.device, s.sum,
               {s.rows, s.heads, s.headdim, s.states});
  if (params.checkpoints.present()) {
    check_output(kOp, "checkpoints", params.checkpoints, s.device, s.sum,
                 {s.batch, ceil_div(s.length, kCheckpointInterval), s.heads, s.headdim, s.states});
    check_contiguous(kOp, "checkpoints", params.checkpoints);
  }
  check_workspace(kOp, params.workspace, forward_workspace(params.in), s.device);
  if (s.device.is_cuda()) {
#if MAMBA_WITH_CUDA
    forward_on_cuda(params, s);
#else
    fail_without_cuda(kOp);
#endif
  } else if (s.dtype == DType::f64) {
    reference::forward<double>(params);
  } else {
    cpu::forward(params);
  }
}

std::int64_t backward_workspace(const BackwardParams& params) {
  const Sizes s = check_inputs("ssd_backward", params.in);
#if MAMBA_WITH_CUDA
  if (s.device.is_cuda() && has_steps(s)) {
    return plan_backward(params).size;
  }
#else
  static_cast<void>(s);
#endif
  return 0;
}

void backward(const BackwardParams& params) {
  constexpr char kOp[] = "ssd_backward";
  const Inputs& in = params.in;
  const Sizes s = check_inputs(kOp, in);
  const std::initializer_list<std::int64_t> activation = {s.batch, s.length, s.heads, s.headdim};
  const std::initializer_list<std::int64_t> projection = {s.batch, s.length, s.groups, s.states};
  const std::initializer_list<std::int64_t> state = {s.rows, s.heads, s.headdim, s.states};
  check_activation(kOp, "dout", params.dout, s);
  check_optional_input(kOp, "dlast_states", params.dlast_states, s.device, s.sum, state);
  check_input(kOp, "checkpoints", params.checkpoints, s.device, s.sum,
              {s.batch, ceil_div(s.length, kCheckpointInterval), s.heads, s.headdim, s.states});
  check_contiguous(kOp, "checkpoints", params.checkpoints);
  check_output(kOp, "dx", params.dx, s.device, s.dtype, activation);
  check_output(kOp, "ddt", params.ddt, s.device, in.dt.dtype, {s.batch, s.length, s.heads});
  check_output(kOp, "dA", params.dA, s.device, s.sum, {s.heads});
  check_output(kOp, "dB", params.dB, s.device, s.sum, projection);
  check_contiguous(kOp, "dB", params.dB);
  check_output(kOp, "dC", params.dC, s.device, s.sum, projection);
  check_contiguous(kOp, "dC", params.dC);
  if (in.D.dim == 2) {
    check_output(kOp, "dD", params.dD, s.device, s.sum, {s.heads, s.headdim});
  } else {
    check_optional_output(kOp, "dD", params.dD, "D", in.D, s.device, s.sum, {s.heads});
  }
  check_optional_output(kOp, "dz", params.dz, "z", in.z, s.device, s.dtype, activation);
  check_optional_output(kOp, "ddt_bias", params.ddt_bias, "dt_bias", in.dt_bias, s.device, s.sum,
                        {s.heads});
  check_optional_output(kOp, "dinitial_states", params.dinitial_states, "initial_states",
                        in.initial_states, s.device, s.sum, state);
  check_workspace(kOp, params.workspace, backward_workspace(params), s.device);
  if (s.device.is_cuda()) {
#if MAMBA_WITH_CUDA
    backward_on_cuda(params, s);
#else
    fail_without_cuda(kOp);
#endif
  } else if (s.dtype == DType::f64) {
    reference::backward<double>(params);
  } else {
    cpu::backward(params);
  }
}

}  // namespace mamba_native::ssd
