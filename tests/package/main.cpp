// A selective scan on plain buffers. The README shows this file.
#include <cstdio>
#include <vector>

#include "core/error.h"
#include "selective_scan/selective_scan.h"

int main() {
  namespace scan = mamba_native::selective_scan;
  using mamba_native::DType;
  using mamba_native::TensorView;
  const int batch = 1, channels = 4, length = 64, d_state = 16;

  std::vector<float> u(batch * channels * length, 1.0f), delta(u.size(), 0.5f), out(u.size());
  std::vector<float> A(channels * d_state, -1.0f), B(A.size(), 1.0f), C(A.size(), 1.0f);
  std::vector<float> last_state(batch * channels * d_state), checkpoints(last_state.size());

  scan::ForwardParams params;
  params.in.u = TensorView(u.data(), DType::f32, {batch, channels, length});
  params.in.delta = TensorView(delta.data(), DType::f32, {batch, channels, length});
  params.in.A = TensorView(A.data(), DType::f32, {channels, d_state});
  params.in.B = TensorView(B.data(), DType::f32, {channels, d_state});
  params.in.C = TensorView(C.data(), DType::f32, {channels, d_state});
  params.out = TensorView(out.data(), DType::f32, {batch, channels, length});
  params.last_state = TensorView(last_state.data(), DType::f32, {batch, channels, d_state});
  params.checkpoints = TensorView(checkpoints.data(), DType::f32, {batch, channels, 1, d_state});
  try {
    scan::forward(params);
  } catch (const mamba_native::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  std::printf("y[0] = %.4f, y[%d] = %.4f\n", out.front(), length - 1, out.back());
}
