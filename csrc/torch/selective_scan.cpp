#include "selective_scan/selective_scan.h"

#include <tuple>

#include "binding.h"
#include "box.h"
#include "core/math.h"

namespace mamba_native::binding {
namespace {

selective_scan::Inputs scan_inputs(const char* op, const Tensor& u, const Tensor& delta,
                                   const Tensor& A, const Tensor& B, const Tensor& C,
                                   const Optional& D, const Optional& z, const Optional& delta_bias,
                                   const Optional& initial_state, bool delta_softplus,
                                   const Optional& seq_idx, std::int64_t sequences, bool reverse) {
  check_dim(op, "u", u, 3);
  if (view(op, "A", A).dim != 3) {  // complex A: (D, N, 2)
    check_dim(op, "A", A, 2);
  }
  selective_scan::Inputs in;
  in.u = view(op, "u", u);
  in.delta = view(op, "delta", delta);
  in.A = view(op, "A", A);
  in.B = view(op, "B", B);
  in.C = view(op, "C", C);
  in.D = view(op, "D", D);
  in.z = view(op, "z", z);
  in.delta_bias = view(op, "delta_bias", delta_bias);
  in.initial_state = view(op, "initial_state", initial_state);
  in.delta_softplus = delta_softplus;
  in.seq_idx = view(op, "seq_idx", seq_idx);
  in.sequences = sequences;
  in.reverse = reverse;
  return in;
}

// The sizes of states: `leading`, then N, and 2 where A is complex.
Sizes with_states(Sizes leading, const Tensor& A) {
  for (std::int64_t i = 1; i < A.dim(); ++i) {
    leading.push_back(A.size(i));
  }
  return leading;
}

std::tuple<Tensor, Tensor, Tensor> selective_scan_forward(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const Optional& D, const Optional& z, const Optional& delta_bias, const Optional& initial_state,
    bool delta_softplus, const Optional& seq_idx, std::int64_t sequences, bool reverse) {
  constexpr char kOp[] = "selective_scan_forward";
  selective_scan::ForwardParams params;
  params.in = scan_inputs(kOp, u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus,
                          seq_idx, sequences, reverse);
  const DeviceScope scope(u);
  const std::int64_t batch = u.size(0), channels = u.size(1), length = u.size(2);
  const std::int64_t tiles = ceil_div(length, selective_scan::kCheckpointInterval);
  const Scalar state = accumulator_of(u);
  Tensor out = empty(u, {batch, channels, length}, u.scalar_type());
  Tensor last_state =
      empty(u, with_states({sequences > 0 ? sequences : batch, channels}, A), state);
  Tensor checkpoints = empty(u, with_states({batch, channels, tiles}, A), state);
  params.out = view(kOp, "out", out);
  params.last_state = view(kOp, "last_state", last_state);
  params.checkpoints = view(kOp, "checkpoints", checkpoints);
  params.stream = scope.stream();
  selective_scan::forward(params);
  return {out, last_state, checkpoints};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
selective_scan_backward(const Tensor& dout, const Optional& dlast_state, const Tensor& u,
                        const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                        const Optional& D, const Optional& z, const Optional& delta_bias,
                        const Optional& initial_state, const Tensor& checkpoints,
                        bool delta_softplus, const Optional& seq_idx, std::int64_t sequences,
                        bool reverse, bool deterministic) {
  constexpr char kOp[] = "selective_scan_backward";
  selective_scan::BackwardParams params;
  params.in = scan_inputs(kOp, u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus,
                          seq_idx, sequences, reverse);
  const DeviceScope scope(u);
  const Scalar dtype = u.scalar_type();
  const Scalar sum = accumulator_of(u);
  const std::int64_t channels = u.size(1);
  Tensor du = empty(u, sizes_of(u), dtype);
  Tensor ddelta = empty(u, sizes_of(u), dtype);
  Tensor dA = empty(u, sizes_of(A), sum);
  Tensor dB = empty(u, sizes_of(B), sum);
  Tensor dC = empty(u, sizes_of(C), sum);
  Tensor dD = D ? empty(u, {channels}, sum) : nothing(u, sum);
  Tensor dz = z ? empty(u, sizes_of(u), dtype) : nothing(u, dtype);
  Tensor ddelta_bias = delta_bias ? empty(u, {channels}, sum) : nothing(u, sum);
  Tensor dinitial_state = initial_state ? empty(u, sizes_of(*initial_state), sum) : nothing(u, sum);
  params.dout = view(kOp, "dout", dout);
  params.dlast_state = view(kOp, "dlast_state", dlast_state);
  params.checkpoints = view(kOp, "checkpoints", checkpoints);
  params.du = view(kOp, "du", du);
  params.ddelta = view(kOp, "ddelta", ddelta);
  params.dA = view(kOp, "dA", dA);
  params.dB = view(kOp, "dB", dB);
  params.dC = view(kOp, "dC", dC);
  params.dD = D ? view(kOp, "dD", dD) : TensorView();
  params.dz = z ? view(kOp, "dz", dz) : TensorView();
  params.ddelta_bias = delta_bias ? view(kOp, "ddelta_bias", ddelta_bias) : TensorView();
  params.dinitial_state =
      initial_state ? view(kOp, "dinitial_state", dinitial_state) : TensorView();
  params.deterministic = deterministic;
  Tensor workspace = empty(u, {selective_scan::backward_workspace(params)}, sum);
  params.workspace = view(kOp, "workspace", workspace);
  params.stream = scope.stream();
  selective_scan::backward(params);
  return {du,
          ddelta,
          dA,
          to_dtype(dB, B.scalar_type()),
          to_dtype(dC, C.scalar_type()),
          dD,
          dz,
          ddelta_bias,
          dinitial_state};
}

}  // namespace
}  // namespace mamba_native::binding

STABLE_TORCH_LIBRARY_FRAGMENT(mamba_native, m) {
  m.def(
      "selective_scan_forward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
      "Tensor? z, Tensor? delta_bias, Tensor? initial_state, bool delta_softplus, "
      "Tensor? seq_idx=None, SymInt sequences=0, bool reverse=False) "
      "-> (Tensor out, Tensor last_state, Tensor checkpoints)");
  m.def(
      "selective_scan_backward(Tensor dout, Tensor? dlast_state, Tensor u, Tensor delta, Tensor A, "
      "Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? initial_state, "
      "Tensor checkpoints, bool delta_softplus, Tensor? seq_idx=None, SymInt sequences=0, "
      "bool reverse=False, bool deterministic=False) -> (Tensor du, Tensor ddelta, Tensor dA, "
      "Tensor dB, Tensor dC, Tensor dD, Tensor dz, Tensor ddelta_bias, Tensor dinitial_state)");
}

STABLE_TORCH_LIBRARY_IMPL(mamba_native, CPU, m) {
  m.impl("selective_scan_forward", MAMBA_BOX(&mamba_native::binding::selective_scan_forward));
  m.impl("selective_scan_backward", MAMBA_BOX(&mamba_native::binding::selective_scan_backward));
}

#if MAMBA_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mamba_native, CUDA, m) {
  m.impl("selective_scan_forward", MAMBA_BOX(&mamba_native::binding::selective_scan_forward));
  m.impl("selective_scan_backward", MAMBA_BOX(&mamba_native::binding::selective_scan_backward));
}
#endif
