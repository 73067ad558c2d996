#include "ssd/scan_order.h"

namespace mamba_native::ssd {
namespace {

void mirror(TensorView& view) {
  if (view.present()) {
    view.mirror(1);  // time
  }
}

void mirror(Inputs& in) {
  for (TensorView* view : {&in.x, &in.dt, &in.B, &in.C, &in.z, &in.seq_idx}) {
    mirror(*view);
  }
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
    for (TensorView* view :
         {&ordered.dout, &ordered.dx, &ordered.ddt, &ordered.dB, &ordered.dC, &ordered.dz}) {
      mirror(*view);
    }
  }
  return ordered;
}

}  // namespace mamba_native::ssd
