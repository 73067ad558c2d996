#include "ssd/ssd.h"

#include <tuple>

#include "binding.h"
#include "box.h"
#include "core/math.h"

namespace mamba_native::binding {
namespace {

ssd::Inputs ssd_inputs(const char* op, const Tensor& x, const Tensor& dt, const Tensor& A,
                       const Tensor& B, const Tensor& C, const Optional& D, const Optional& z,
                       const Optional& dt_bias, const Optional& initial_states, bool dt_softplus,
                       double dt_min, double dt_max, const Optional& seq_idx,
                       std::int64_t sequences, bool reverse) {
  check_dim(op, "x", x, 4);
  check_dim(op, "B", B, 4);
  ssd::Inputs in;
  in.x = view(op, "x", x);
  in.dt = view(op, "dt", dt);
  in.A = view(op, "A", A);
  in.B = view(op, "B", B);
  in.C = view(op, "C", C);
  in.D = view(op, "D", D);
  in.z = view(op, "z", z);
  in.dt_bias = view(op, "dt_bias", dt_bias);
  in.initial_states = view(op, "initial_states", initial_states);
  in.seq_idx = view(op, "seq_idx", seq_idx);
  in.sequences = sequences;
  in.dt_softplus = dt_softplus;
  in.dt_min = dt_min;
  in.dt_max = dt_max;
  in.reverse = reverse;
  return in;
}

std::tuple<Tensor, Tensor, Tensor> ssd_forward(const Tensor& x, const Tensor& dt, const Tensor& A,
                                               const Tensor& B, const Tensor& C, const Optional& D,
                                               const Optional& z, const Optional& dt_bias,
                                               const Optional& initial_states, bool dt_softplus,
                                               double dt_min, double dt_max,
                                               const Optional& seq_idx, std::int64_t sequences,
                                               bool reverse, bool checkpoints) {
  constexpr char kOp[] = "ssd_forward";
  ssd::ForwardParams params;
  params.in = ssd_inputs(kOp, x, dt, A, B, C, D, z, dt_bias, initial_states, dt_softplus, dt_min,
                         dt_max, seq_idx, sequences, reverse);
  const DeviceScope scope(x);
  const std::int64_t batch = x.size(0), length = x.size(1), heads = x.size(2), headdim = x.size(3),
                     d_state = B.size(3);
  const Scalar state = accumulator_of(x);
  Tensor out = empty(x, {batch, length, heads, headdim}, x.scalar_type());
  Tensor last_states =
      empty(x, {sequences > 0 ? sequences : batch, heads, headdim, d_state}, state);
  Tensor stored =
      checkpoints
          ? empty(x, {batch, ceil_div(length, ssd::kCheckpointInterval), heads, headdim, d_state},
                  state)
          : nothing(x, state);
  params.out = view(kOp, "out", out);
  params.last_states = view(kOp, "last_states", last_states);
  params.checkpoints = checkpoints ? view(kOp, "checkpoints", stored) : TensorView();
  Tensor workspace = empty(x, {ssd::forward_workspace(params.in)}, Scalar::Float);
  params.workspace = view(kOp, "workspace", workspace);
  params.stream = scope.stream();
  ssd::forward(params);
  return {out, last_states, stored};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ssd_backward(
    const Tensor& dout, const Optional& dlast_states, const Tensor& x, const Tensor& dt,
    const Tensor& A, const Tensor& B, const Tensor& C, const Optional& D, const Optional& z,
    const Optional& dt_bias, const Optional& initial_states, const Tensor& checkpoints,
    bool dt_softplus, double dt_min, double dt_max, const Optional& seq_idx, std::int64_t sequences,
    bool reverse, bool deterministic) {
  constexpr char kOp[] = "ssd_backward";
  ssd::BackwardParams params;
  params.in = ssd_inputs(kOp, x, dt, A, B, C, D, z, dt_bias, initial_states, dt_softplus, dt_min,
                         dt_max, seq_idx, sequences, reverse);
  const DeviceScope scope(x);
  const Scalar dtype = x.scalar_type();
  const Scalar sum = accumulator_of(x);
  const std::int64_t heads = x.size(2);
  Tensor dx = empty(x, sizes_of(x), dtype);
  Tensor ddt = empty(x, sizes_of(dt), dt.scalar_type());
  Tensor dA = empty(x, {heads}, sum);
  Tensor dB = empty(x, sizes_of(B), sum);
  Tensor dC = empty(x, sizes_of(C), sum);
  Tensor dD = D ? empty(x, sizes_of(*D), sum) : nothing(x, sum);
  Tensor dz = z ? empty(x, sizes_of(x), dtype) : nothing(x, dtype);
  Tensor ddt_bias = dt_bias ? empty(x, {heads}, sum) : nothing(x, sum);
  Tensor dinitial_states =
      initial_states ? empty(x, sizes_of(*initial_states), sum) : nothing(x, sum);
  params.dout = view(kOp, "dout", dout);
  params.dlast_states = view(kOp, "dlast_states", dlast_states);
  params.checkpoints = view(kOp, "checkpoints", checkpoints);
  params.dx = view(kOp, "dx", dx);
  params.ddt = view(kOp, "ddt", ddt);
  params.dA = view(kOp, "dA", dA);
  params.dB = view(kOp, "dB", dB);
  params.dC = view(kOp, "dC", dC);
  params.dD = D ? view(kOp, "dD", dD) : TensorView();
  params.dz = z ? view(kOp, "dz", dz) : TensorView();
  params.ddt_bias = dt_bias ? view(kOp, "ddt_bias", ddt_bias) : TensorView();
  params.dinitial_states =
      initial_states ? view(kOp, "dinitial_states", dinitial_states) : TensorView();
  params.deterministic = deterministic;
  Tensor workspace = empty(x, {ssd::backward_workspace(params)}, Scalar::Float);
  params.workspace = view(kOp, "workspace", workspace);
  params.stream = scope.stream();
  ssd::backward(params);
  return {dx,
          ddt,
          dA,
          to_dtype(dB, B.scalar_type()),
          to_dtype(dC, C.scalar_type()),
          dD,
          dz,
          ddt_bias,
          dinitial_states};
}

}  // namespace
}  // namespace mamba_native::binding

STABLE_TORCH_LIBRARY_FRAGMENT(mamba_native, m) {
  m.def(
      "ssd_forward(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? dt_bias, Tensor? initial_states, bool dt_softplus, float dt_min, float dt_max, "
      "Tensor? seq_idx, SymInt sequences, bool reverse, bool checkpoints) "
      "-> (Tensor out, Tensor last_states, Tensor checkpoints)");
  m.def(
      "ssd_backward(Tensor dout, Tensor? dlast_states, Tensor x, Tensor dt, Tensor A, Tensor B, "
      "Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_states, "
      "Tensor checkpoints, bool dt_softplus, float dt_min, float dt_max, Tensor? seq_idx, "
      "SymInt sequences, bool reverse, bool deterministic) "
      "-> (Tensor dx, Tensor ddt, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, "
      "Tensor ddt_bias, Tensor dinitial_states)");
}

STABLE_TORCH_LIBRARY_IMPL(mamba_native, CPU, m) {
  m.impl("ssd_forward", MAMBA_BOX(&mamba_native::binding::ssd_forward));
  m.impl("ssd_backward", MAMBA_BOX(&mamba_native::binding::ssd_backward));
}

#if MAMBA_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mamba_native, CUDA, m) {
  m.impl("ssd_forward", MAMBA_BOX(&mamba_native::binding::ssd_forward));
  m.impl("ssd_backward", MAMBA_BOX(&mamba_native::binding::ssd_backward));
}
#endif
