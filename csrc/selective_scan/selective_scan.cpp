#include "selective_scan/selective_scan.h"

#include <cstdint>

#include "core/check.h"
#include "core/error.h"
#include "core/math.h"
#include "selective_scan/cpu.h"
#include "selective_scan/reference.h"
#if MAMBA_WITH_CUDA
#include "core/cuda/copy.h"
#include "selective_scan/complex.h"
#include "selective_scan/plan.h"
#endif

namespace mamba_native::selective_scan {
namespace {

struct Sizes {
  std::int64_t batch;
  std::int64_t rows;  // of states: batch, or sequences
  std::int64_t channels;
  std::int64_t length;
  std::int64_t states;
  DType dtype;  // of the activations
  DType sum;    // of parameters, states and sums
  Device device;
  bool is_complex;

  Shape activations() const { return {batch, channels, length}; }
  // The shape of A, B, C or states, from the one that they have where they are real.
  Shape numbers(Shape shape) const {
    if (is_complex) {
      shape.size[shape.dim++] = 2;
    }
    return shape;
  }
  Shape parameters() const { return numbers({channels, states}); }
  Shape state() const { return numbers({rows, channels, states}); }
  Shape projection(std::int64_t groups) const { return numbers({batch, groups, states, length}); }
  Shape checkpoints() const {
    return numbers({batch, channels, ceil_div(length, kCheckpointInterval), states});
  }
};

// B or C: static (D, N) or time-varying (B, G, N, L).
void check_projection(const char* op, const char* argument, const TensorView& tensor,
                      const Sizes& sizes) {
  const int parts = sizes.is_complex ? 1 : 0;  // dimensions of a number
  MAMBA_CHECK(tensor.dim == 2 + parts || tensor.dim == 4 + parts, op, ": ", argument,
              " must have shape (", sizes.channels, ", ", sizes.states, parts > 0 ? ", 2" : "",
              ") or (", sizes.batch, ", groups, ", sizes.states, ", ", sizes.length,
              parts > 0 ? ", 2" : "", "), got ", describe(tensor));
  if (!is_varying(tensor)) {
    check_input(op, argument, tensor, sizes.device, sizes.sum, sizes.parameters());
    return;
  }
  const std::int64_t groups = tensor.size[1];
  MAMBA_CHECK(groups > 0 && sizes.channels % groups == 0, op, ": the ", sizes.channels,
              " channels of u cannot be divided into the ", groups, " groups of ", argument);
  check_input(op, argument, tensor, sizes.device, sizes.dtype, sizes.projection(groups));
}

Sizes check_inputs(const char* op, const Inputs& in) {
  MAMBA_CHECK(in.u.dim == 3, op, ": u must have shape (batch, channels, length), got ",
              describe(in.u));
  MAMBA_CHECK(
      in.A.dim == 2 || (in.is_complex() && in.A.size[2] == 2), op,
      ": A must have shape (channels, states), or (channels, states, 2) for complex A, got ",
      describe(in.A));
  check_float(op, "u", in.u);
  MAMBA_CHECK(in.sequences >= 0, op, ": sequences must be 0 or their number, got ", in.sequences);
  MAMBA_CHECK(in.sequences == 0 || (in.u.size[0] == 1 && in.seq_idx.present()), op,
              ": with sequences, u must have batch 1 and seq_idx must say which sequence a step "
              "belongs to, got u ",
              describe(in.u), in.seq_idx.present() ? "" : " and no seq_idx");
  const Sizes sizes = {in.u.size[0],
                       in.sequences > 0 ? in.sequences : in.u.size[0],
                       in.u.size[1],
                       in.u.size[2],
                       in.A.size[1],
                       in.u.dtype,
                       in.u.dtype == DType::f64 ? DType::f64 : DType::f32,
                       in.u.device,
                       in.is_complex()};
  MAMBA_CHECK(sizes.states > 0, op, ": A must have at least one state, got ", describe(in.A));
  check_memory(op, "u", in.u, sizes.device);
  check_input(op, "delta", in.delta, sizes.device, sizes.dtype, sizes.activations());
  check_input(op, "A", in.A, sizes.device, sizes.sum, sizes.parameters());
  check_projection(op, "B", in.B, sizes);
  check_projection(op, "C", in.C, sizes);
  MAMBA_CHECK(!is_varying(in.B) || !is_varying(in.C) || in.B.size[1] == in.C.size[1], op,
              ": B has ", in.B.size[1], " groups and C ", in.C.size[1]);
  check_optional_input(op, "D", in.D, sizes.device, sizes.sum, {sizes.channels});
  check_optional_input(op, "z", in.z, sizes.device, sizes.dtype, sizes.activations());
  check_optional_input(op, "delta_bias", in.delta_bias, sizes.device, sizes.sum, {sizes.channels});
  check_optional_input(op, "initial_state", in.initial_state, sizes.device, sizes.sum,
                       sizes.state());
  check_optional_input(op, "seq_idx", in.seq_idx, sizes.device, DType::i32,
                       {sizes.batch, sizes.length});
  return sizes;
}

void check_projection_gradient(const char* op, const char* argument, const TensorView& tensor,
                               const TensorView& input, const Sizes& sizes) {
  check_output(op, argument, tensor, sizes.device, sizes.sum,
               is_varying(input) ? sizes.projection(input.size[1]) : sizes.parameters());
  check_contiguous(op, argument, tensor);
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

// The kernels take no empty tensors. What a scan over nothing leaves, be it the whole call or one
// sequence, whose row a kernel does not touch: the state it began with, and gradients of 0.
bool is_empty(const Sizes& sizes) {
  return sizes.batch == 0 || sizes.channels == 0 || sizes.length == 0;
}

void forward_empty(const ForwardParams& params) {
  mamba_native::cuda::copy_or_zero(params.last_state, params.in.initial_state, params.stream);
}

void backward_empty(const BackwardParams& params) {
  for (const TensorView* sums :
       {&params.dA, &params.dB, &params.dC, &params.dD, &params.ddelta_bias}) {
    mamba_native::cuda::copy_or_zero(*sums, TensorView(), params.stream);
  }
  mamba_native::cuda::copy_or_zero(params.dinitial_state, params.dlast_state, params.stream);
}
#else
[[noreturn]] void fail_without_cuda(const char* op) {
  fail(op,
       ": the tensors are on a CUDA device, but this library was built without CUDA; build it with "
       "-DMAMBA_CUDA=ON");
}
#endif

}  // namespace

void forward(const ForwardParams& params) {
  constexpr char kOp[] = "selective_scan_forward";
  const Sizes sizes = check_inputs(kOp, params.in);
  check_output(kOp, "out", params.out, sizes.device, sizes.dtype, sizes.activations());
  check_output(kOp, "last_state", params.last_state, sizes.device, sizes.sum, sizes.state());
  check_output(kOp, "checkpoints", params.checkpoints, sizes.device, sizes.sum,
               sizes.checkpoints());
  check_contiguous(kOp, "checkpoints", params.checkpoints);
  if (sizes.device.is_cuda()) {
#if MAMBA_WITH_CUDA
    if (is_empty(sizes) || params.in.sequences > 0) {
      forward_empty(params);
    }
    if (!is_empty(sizes)) {
      if (sizes.is_complex) {
        cuda::forward_complex(params);
      } else {
        for_dtype(sizes.dtype, CudaForward{params});
      }
    }
#else
    fail_without_cuda(kOp);
#endif
  } else if (sizes.dtype == DType::f64) {
    reference::forward<double>(params);
  } else {
    cpu::forward(params);
  }
}

std::int64_t backward_workspace(const BackwardParams& params) {
  const Sizes sizes = check_inputs("selective_scan_backward", params.in);
#if MAMBA_WITH_CUDA
  const bool ordered = params.deterministic || sizes.is_complex;
  if (ordered && sizes.device.is_cuda() && !is_empty(sizes)) {
    const Problem problem = problem_of(params);
    const BackwardConfig config =
        sizes.is_complex
            ? kComplexBackward
            : kBackwardConfigs[choose_backward(
                  problem, mamba_native::cuda::device_info(sizes.device.index), params.config)];
    return wanted_floats(ordered_workspace(problem, config), problem.tiles());
  }
#else
  static_cast<void>(sizes);
#endif
  return 0;
}

void backward(const BackwardParams& params) {
  constexpr char kOp[] = "selective_scan_backward";
  const Inputs& in = params.in;
  const Sizes sizes = check_inputs(kOp, in);
  const Shape activations = sizes.activations();
  const Shape state = sizes.state();
  check_input(kOp, "dout", params.dout, sizes.device, sizes.dtype, activations);
  check_optional_input(kOp, "dlast_state", params.dlast_state, sizes.device, sizes.sum, state);
  check_input(kOp, "checkpoints", params.checkpoints, sizes.device, sizes.sum, sizes.checkpoints());
  check_contiguous(kOp, "checkpoints", params.checkpoints);
  check_output(kOp, "du", params.du, sizes.device, sizes.dtype, activations);
  check_output(kOp, "ddelta", params.ddelta, sizes.device, sizes.dtype, activations);
  check_output(kOp, "dA", params.dA, sizes.device, sizes.sum, sizes.parameters());
  check_projection_gradient(kOp, "dB", params.dB, in.B, sizes);
  check_projection_gradient(kOp, "dC", params.dC, in.C, sizes);
  check_optional_output(kOp, "dD", params.dD, "D", in.D, sizes.device, sizes.sum, {sizes.channels});
  check_optional_output(kOp, "dz", params.dz, "z", in.z, sizes.device, sizes.dtype, activations);
  check_optional_output(kOp, "ddelta_bias", params.ddelta_bias, "delta_bias", in.delta_bias,
                        sizes.device, sizes.sum, {sizes.channels});
  check_optional_output(kOp, "dinitial_state", params.dinitial_state, "initial_state",
                        in.initial_state, sizes.device, sizes.sum, state);
  const std::int64_t workspace = backward_workspace(params);
  if (workspace > 0) {
    check_output(kOp, "workspace", params.workspace, sizes.device, DType::f32, {workspace});
    check_contiguous(kOp, "workspace", params.workspace);
    MAMBA_CHECK(reinterpret_cast<std::uintptr_t>(params.workspace.data) % 16 == 0, kOp,
                ": workspace must be aligned to 16 bytes");
  }
  if (sizes.device.is_cuda()) {
#if MAMBA_WITH_CUDA
    if (is_empty(sizes) || in.sequences > 0) {
      backward_empty(params);
    }
    if (!is_empty(sizes)) {
      if (sizes.is_complex) {
        cuda::backward_complex(params);
      } else {
        for_dtype(sizes.dtype, CudaBackward{params});
      }
    }
#else
    fail_without_cuda(kOp);
#endif
  } else if (sizes.dtype == DType::f64) {
    reference::backward<double>(params);
  } else {
    cpu::backward(params);
  }
}

}  // namespace mamba_native::selective_scan
