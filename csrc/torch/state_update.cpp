#include "state_update/state_update.h"

#include "binding.h"
#include "box.h"

namespace mamba_native::binding {
namespace {

Tensor selective_state_update(Tensor state, const Tensor& x, const Tensor& dt, const Tensor& A,
                              const Tensor& B, const Tensor& C, const Optional& D,
                              const Optional& z, const Optional& dt_bias, bool dt_softplus,
                              bool A_is_log, double dt_min, double dt_max,
                              const Optional& state_batch_indices) {
  constexpr char kOp[] = "selective_state_update";
  state_update::Params params;
  params.x = view(kOp, "x", x);
  const DeviceScope scope(x);
  Tensor out = empty(x, sizes_of(x), x.scalar_type());
  params.state = view(kOp, "state", state);
  params.dt = view(kOp, "dt", dt);
  params.A = view(kOp, "A", A);
  params.B = view(kOp, "B", B);
  params.C = view(kOp, "C", C);
  params.D = view(kOp, "D", D);
  params.z = view(kOp, "z", z);
  params.dt_bias = view(kOp, "dt_bias", dt_bias);
  params.state_batch_indices = view(kOp, "state_batch_indices", state_batch_indices);
  params.out = view(kOp, "out", out);
  params.dt_softplus = dt_softplus;
  params.A_is_log = A_is_log;
  params.dt_min = dt_min;
  params.dt_max = dt_max;
  params.stream = scope.stream();
  state_update::update(params);
  return out;
}

}  // namespace
}  // namespace mamba_native::binding

STABLE_TORCH_LIBRARY_FRAGMENT(mamba_native, m) {
  m.def(
      "selective_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, "
      "Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, bool A_is_log, float dt_min, "
      "float dt_max, Tensor? state_batch_indices) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mamba_native, CPU, m) {
  m.impl("selective_state_update", MAMBA_BOX(&mamba_native::binding::selective_state_update));
}

#if MAMBA_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mamba_native, CUDA, m) {
  m.impl("selective_state_update", MAMBA_BOX(&mamba_native::binding::selective_state_update));
}
#endif
