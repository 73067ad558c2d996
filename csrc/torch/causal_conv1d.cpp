#include "causal_conv1d/causal_conv1d.h"

#include <tuple>

#include "binding.h"
#include "box.h"
#include "core/error.h"

namespace mamba_native::binding {
namespace {

causal_conv1d::Inputs conv_inputs(const char* op, const Tensor& x, const Tensor& weight,
                                  const Optional& bias, const Optional& seq_idx,
                                  const Optional& initial_states, bool silu) {
  check_dim(op, "x", x, 3);
  check_dim(op, "weight", weight, 2);
  causal_conv1d::Inputs in;
  in.x = view(op, "x", x);
  in.weight = view(op, "weight", weight);
  in.bias = view(op, "bias", bias);
  in.seq_idx = view(op, "seq_idx", seq_idx);
  in.initial_states = view(op, "initial_states", initial_states);
  in.silu = silu;
  return in;
}

// Channel-last in, channel-last out.
Tensor empty_in_layout_of(const Tensor& x) {
  const bool channel_last = x.stride(1) == 1 && x.stride(2) > 1;
  return empty_ordered(x, sizes_of(x),
                       channel_last ? std::vector<int>{0, 2, 1} : std::vector<int>{0, 1, 2},
                       x.scalar_type());
}

// (B, D, W-1) with the channels side by side, as decode steps want it.
Tensor empty_states(const Tensor& x, const Tensor& weight) {
  return empty_ordered(x, {x.size(0), x.size(1), weight.size(1) - 1}, {0, 2, 1}, x.scalar_type());
}

void check_width(const char* op, const Tensor& weight) {
  MAMBA_CHECK(weight.size(1) >= 1, op, ": weight must have a width between ",
              causal_conv1d::kMinWidth, " and ", causal_conv1d::kMaxWidth, ", got ",
              weight.size(1));
}

std::tuple<Tensor, Tensor> causal_conv1d_forward(const Tensor& x, const Tensor& weight,
                                                 const Optional& bias, const Optional& seq_idx,
                                                 const Optional& initial_states,
                                                 bool return_final_states, bool silu) {
  constexpr char kOp[] = "causal_conv1d_forward";
  causal_conv1d::ForwardParams params;
  params.in = conv_inputs(kOp, x, weight, bias, seq_idx, initial_states, silu);
  check_width(kOp, weight);
  const DeviceScope scope(x);
  Tensor out = empty_in_layout_of(x);
  Tensor final_states = return_final_states ? empty_states(x, weight) : nothing(x, x.scalar_type());
  params.out = view(kOp, "out", out);
  params.final_states =
      return_final_states ? view(kOp, "final_states", final_states) : TensorView();
  params.stream = scope.stream();
  causal_conv1d::forward(params);
  return {out, final_states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_backward(
    const Tensor& dout, const Optional& dfinal_states, const Tensor& x, const Tensor& weight,
    const Optional& bias, const Optional& seq_idx, const Optional& initial_states, bool silu,
    bool deterministic) {
  constexpr char kOp[] = "causal_conv1d_backward";
  causal_conv1d::BackwardParams params;
  params.in = conv_inputs(kOp, x, weight, bias, seq_idx, initial_states, silu);
  check_width(kOp, weight);
  const DeviceScope scope(x);
  const Scalar sum = accumulator_of(x);
  Tensor dx = empty_in_layout_of(x);
  Tensor dweight = empty(x, sizes_of(weight), sum);
  Tensor dbias = bias ? empty(x, {x.size(1)}, sum) : nothing(x, sum);
  Tensor dinitial = initial_states ? empty_states(x, weight) : nothing(x, x.scalar_type());
  params.dout = view(kOp, "dout", dout);
  params.dfinal_states = view(kOp, "dfinal_states", dfinal_states);
  params.dx = view(kOp, "dx", dx);
  params.dweight = view(kOp, "dweight", dweight);
  params.dbias = bias ? view(kOp, "dbias", dbias) : TensorView();
  params.dinitial_states = initial_states ? view(kOp, "dinitial_states", dinitial) : TensorView();
  Tensor workspace = nothing(x, Scalar::Float);
  if (deterministic) {
    workspace = empty(x, {causal_conv1d::workspace_rows(params.in), x.size(1), weight.size(1) + 1},
                      Scalar::Float);
    params.workspace = view(kOp, "workspace", workspace);
  }
  params.stream = scope.stream();
  causal_conv1d::backward(params);
  return {dx, to_dtype(dweight, weight.scalar_type()), to_dtype(dbias, weight.scalar_type()),
          dinitial};
}

Tensor causal_conv1d_update(const Tensor& x, Tensor conv_state, const Tensor& weight,
                            const Optional& bias, bool silu, const Optional& cache_seqlens,
                            const Optional& conv_state_indices) {
  constexpr char kOp[] = "causal_conv1d_update";
  check_dim(kOp, "x", x, 3);
  const DeviceScope scope(x);
  Tensor out = empty(x, sizes_of(x), x.scalar_type());
  causal_conv1d::UpdateParams params;
  params.x = view(kOp, "x", x);
  params.conv_state = view(kOp, "conv_state", conv_state);
  params.weight = view(kOp, "weight", weight);
  params.bias = view(kOp, "bias", bias);
  params.cache_seqlens = view(kOp, "cache_seqlens", cache_seqlens);
  params.conv_state_indices = view(kOp, "conv_state_indices", conv_state_indices);
  params.out = view(kOp, "out", out);
  params.silu = silu;
  params.stream = scope.stream();
  causal_conv1d::update(params);
  return out;
}

Tensor causal_conv1d_varlen_states(const Tensor& x, const Tensor& cu_seqlens,
                                   std::int64_t state_len) {
  constexpr char kOp[] = "causal_conv1d_varlen_states";
  check_dim(kOp, "x", x, 2);
  check_dim(kOp, "cu_seqlens", cu_seqlens, 1);
  MAMBA_CHECK(
      cu_seqlens.size(0) >= 1 && state_len >= 0, kOp,
      ": cu_seqlens must have one entry more than there are sequences and state_len must not be "
      "negative, got ",
      cu_seqlens.size(0), " entries and state_len ", state_len);
  const DeviceScope scope(x);
  Tensor states =
      empty_ordered(x, {cu_seqlens.size(0) - 1, x.size(1), state_len}, {0, 2, 1}, x.scalar_type());
  causal_conv1d::VarlenStatesParams params;
  params.x = view(kOp, "x", x);
  params.cu_seqlens = view(kOp, "cu_seqlens", cu_seqlens);
  params.states = view(kOp, "states", states);
  params.stream = scope.stream();
  causal_conv1d::varlen_states(params);
  return states;
}

}  // namespace
}  // namespace mamba_native::binding

STABLE_TORCH_LIBRARY_FRAGMENT(mamba_native, m) {
  m.def(
      "causal_conv1d_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, "
      "Tensor? initial_states, bool return_final_states, bool silu) -> (Tensor out, Tensor "
      "final_states)");
  m.def(
      "causal_conv1d_backward(Tensor dout, Tensor? dfinal_states, Tensor x, Tensor weight, Tensor? "
      "bias, "
      "Tensor? seq_idx, Tensor? initial_states, bool silu, bool deterministic=False) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_states)");
  m.def(
      "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, bool "
      "silu, "
      "Tensor? cache_seqlens, Tensor? conv_state_indices) -> Tensor");
  m.def("causal_conv1d_varlen_states(Tensor x, Tensor cu_seqlens, SymInt state_len) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mamba_native, CPU, m) {
  m.impl("causal_conv1d_forward", MAMBA_BOX(&mamba_native::binding::causal_conv1d_forward));
  m.impl("causal_conv1d_backward", MAMBA_BOX(&mamba_native::binding::causal_conv1d_backward));
  m.impl("causal_conv1d_update", MAMBA_BOX(&mamba_native::binding::causal_conv1d_update));
  m.impl("causal_conv1d_varlen_states",
         MAMBA_BOX(&mamba_native::binding::causal_conv1d_varlen_states));
}

#if MAMBA_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mamba_native, CUDA, m) {
  m.impl("causal_conv1d_forward", MAMBA_BOX(&mamba_native::binding::causal_conv1d_forward));
  m.impl("causal_conv1d_backward", MAMBA_BOX(&mamba_native::binding::causal_conv1d_backward));
  m.impl("causal_conv1d_update", MAMBA_BOX(&mamba_native::binding::causal_conv1d_update));
  m.impl("causal_conv1d_varlen_states",
         MAMBA_BOX(&mamba_native::binding::causal_conv1d_varlen_states));
}
#endif
