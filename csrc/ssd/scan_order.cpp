#include "ssd/scan_order.h"

namespace mamba_native::ssd {
namespace {

constexpr int kTime = 1;

void mirror(TensorView& view) {
  if (view.present() && view.size[kTime] > 0) {
    view.data = static_cast<char*>(view.data) +
                (view.size[kTime] - 1) * view.stride[kTime] * size_of(view.dtype);
    view.stride[kTime] = -view.stride[kTime];
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
