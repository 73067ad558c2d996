#include "selective_scan/scan_order.h"

namespace mamba_native::selective_scan {
namespace {

// u and its like, (B, D, L), and seq_idx, (B, L).
void mirror(TensorView& view) {
  if (view.present()) {
    view.mirror(view.dim - 1);
  }
}

// B, C and their gradients.
void mirror_projection(TensorView& view) {
  if (is_varying(view)) {
    view.mirror(3);
  }
}

void mirror(Inputs& in) {
  for (TensorView* view : {&in.u, &in.delta, &in.z, &in.seq_idx}) {
    mirror(*view);
  }
  mirror_projection(in.B);
  mirror_projection(in.C);
  in.reverse = false;
}

}  // namespace

ForwardParams in_scan_order(const ForwardParams& params) {
  ForwardParams ordered = params;
  if (params.in.reverse) {
    mirror(ordered.in);
    mirror(ordered.out);
  }
  return ordered;
}

BackwardParams in_scan_order(const BackwardParams& params) {
  BackwardParams ordered = params;
  if (params.in.reverse) {
    mirror(ordered.in);
    for (TensorView* view : {&ordered.dout, &ordered.du, &ordered.ddelta, &ordered.dz}) {
      mirror(*view);
    }
    mirror_projection(ordered.dB);
    mirror_projection(ordered.dC);
  }
  return ordered;
}

}  // namespace mamba_native::selective_scan
