#include "selective_scan/scan_order.h"

namespace mamba_native::selective_scan {
namespace {

void mirror(TensorView& view) {
  const int time = view.dim - 1;
  if (time < 0 || view.size[time] == 0) {
    return;
  }
  view.data = static_cast<char*>(view.data) +
              (view.size[time] - 1) * view.stride[time] * size_of(view.dtype);
  view.stride[time] = -view.stride[time];
}

// B, C and their gradients, which have time unless they are static, (D, N).
void mirror_projection(TensorView& view) {
  if (view.dim == 4) {
    mirror(view);
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
