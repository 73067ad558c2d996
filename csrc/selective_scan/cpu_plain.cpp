// The loop that one writes first, with nothing but -O3: state in memory, expf from the C library,
// no fast-math. It is exact and portable, and the honest baseline of every speed-up that we print.
#include <cmath>
#include <cstddef>
#include <vector>

#include "core/math.h"
#include "core/parallel_for.h"
#include "selective_scan/cpu.h"
#include "selective_scan/reference.h"
#include "selective_scan/sequences.h"

namespace mamba_native::selective_scan::cpu::plain {
namespace {

template <class T>
const T* row(const TensorView& tensor, std::int64_t i, std::int64_t j) {
  return tensor.as<const T>() + i * tensor.stride[0] + j * tensor.stride[1];
}

float element(const TensorView& tensor, std::int64_t i, float otherwise) {
  return tensor.present() ? tensor.as<const float>()[i * tensor.stride[0]] : otherwise;
}

// B or C of one channel: element (n, t) is data[n * state + t * time]. Static ones are float32.
template <class T>
struct Projection {
  const T* data;
  std::int64_t state;
  std::int64_t time;
};

template <class T>
Projection<T> projection(const TensorView& tensor, std::int64_t b, std::int64_t d,
                         std::int64_t channels) {
  if (tensor.dim == 2) {
    return {tensor.as<const T>() + d * tensor.stride[0], tensor.stride[1], 0};
  }
  const std::int64_t group = d / (channels / tensor.size[1]);
  return {row<T>(tensor, b, group), tensor.stride[2], tensor.stride[3]};
}

// The state that a sequence starts from: a row of `initial`, or 0 where it or the row is absent.
void enter(const TensorView& initial, std::int64_t from, std::int64_t d, std::vector<float>& h) {
  for (std::size_t n = 0; n < h.size(); ++n) {
    h[n] = initial.present() && from >= 0
               ? row<float>(initial, from, d)[static_cast<std::int64_t>(n) * initial.stride[2]]
               : 0.0f;
  }
}

template <class T, class TB, class TC>
void forward_channel(const ForwardParams& params, std::int64_t b, std::int64_t d,
                     std::vector<float>& h) {
  const Inputs& in = params.in;
  const std::int64_t length = in.u.size[2];
  const std::int64_t states = in.A.size[1];
  const T* u = row<T>(in.u, b, d);
  const T* delta_in = row<T>(in.delta, b, d);
  const T* z = in.z.present() ? row<T>(in.z, b, d) : nullptr;
  T* out = params.out.as<T>() + b * params.out.stride[0] + d * params.out.stride[1];
  const float* A = in.A.as<const float>() + d * in.A.stride[0];
  const Projection<TB> B = projection<TB>(in.B, b, d, in.u.size[1]);
  const Projection<TC> C = projection<TC>(in.C, b, d, in.u.size[1]);
  const float D = element(in.D, d, 0.0f);
  const float bias = element(in.delta_bias, d, 0.0f);
  const Sequences sequences = sequences_of(in, b);
  float* state = h.data();
  for (std::int64_t t = 0; t < length; ++t) {
    const bool begins = sequences.begins(t);
    if (begins && t == 0) {
      enter(in.initial_state, sequences.entering(t), d, h);
    }
    if (t % kCheckpointInterval == 0) {
      float* checkpoint = params.checkpoints.as<float>() + b * params.checkpoints.stride[0] +
                          d * params.checkpoints.stride[1] + t / kCheckpointInterval * states;
      for (std::int64_t n = 0; n < states; ++n) {
        checkpoint[n] = state[n];
      }
    }
    if (begins && t > 0) {
      enter(in.initial_state, sequences.entering(t), d, h);
    }
    const float raw = to_float(delta_in[t * in.delta.stride[2]]) + bias;
    const float delta = in.delta_softplus ? softplus(raw) : raw;
    const float input = to_float(u[t * in.u.stride[2]]);
    const float x = delta * input;
    float y = D * input;
    for (std::int64_t n = 0; n < states; ++n) {
      state[n] = std::exp(delta * A[n * in.A.stride[1]]) * state[n] +
                 to_float(B.data[n * B.state + t * B.time]) * x;
      y += to_float(C.data[n * C.state + t * C.time]) * state[n];
    }
    if (z != nullptr) {
      y *= silu(to_float(z[t * in.z.stride[2]]));
    }
    out[t * params.out.stride[2]] = from_float<T>(y);
    const std::int64_t leaving = sequences.ends(t) ? sequences.leaving(t) : -1;
    if (leaving >= 0) {
      float* last = params.last_state.as<float>() + leaving * params.last_state.stride[0] +
                    d * params.last_state.stride[1];
      for (std::int64_t n = 0; n < states; ++n) {
        last[n * params.last_state.stride[2]] = state[n];
      }
    }
  }
}

template <class T>
void forward_of(const ForwardParams& params) {
  const Inputs& in = params.in;
  const std::int64_t channels = in.u.size[1];
  const bool static_B = in.B.dim == 2;
  const bool static_C = in.C.dim == 2;
  const auto channel =
      static_B ? (static_C ? &forward_channel<T, float, float> : &forward_channel<T, float, T>)
               : (static_C ? &forward_channel<T, T, float> : &forward_channel<T, T, T>);
  parallel_for(in.u.size[0] * channels, 1, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> h(static_cast<std::size_t>(in.A.size[1]));
    for (std::int64_t i = begin; i < end; ++i) {
      channel(params, i / channels, i % channels, h);
    }
  });
}

}  // namespace

void forward(const ForwardParams& params) {
  if (params.in.is_complex()) {
    reference::forward<float>(params);
    return;
  }
  for_dtype(params.in.u.dtype, [&](auto zero) { forward_of<decltype(zero)>(params); });
}

void backward(const BackwardParams& params) { reference::backward<float>(params); }

}  // namespace mamba_native::selective_scan::cpu::plain
