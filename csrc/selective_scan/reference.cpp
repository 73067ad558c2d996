#include "selective_scan/reference.h"

#include <cmath>
#include <complex>
#include <cstddef>
#include <vector>

#include "core/math.h"
#include "selective_scan/sequences.h"

namespace mamba_native::selective_scan::reference {
namespace {

std::int64_t offset(const TensorView& tensor, std::int64_t i, std::int64_t j) {
  return i * tensor.stride[0] + j * tensor.stride[1];
}

std::int64_t offset(const TensorView& tensor, std::int64_t i, std::int64_t j, std::int64_t k) {
  return offset(tensor, i, j) + k * tensor.stride[2];
}

// What a state is: Scalar, or std::complex<Scalar>, whose parts a tensor has in its last dimension.
// Everything else of a scan is real.
template <class Number>
struct Numbers {
  using Scalar = Number;
  static constexpr Scalar kWeight = 1;  // y = kWeight Re(sum C h)

  static Number read(const TensorView& tensor, std::int64_t at) {
    return static_cast<Number>(load_double(tensor.data, tensor.dtype, at));
  }
  static void write(const TensorView& tensor, std::int64_t at, Number value) {
    store_float(tensor.data, tensor.dtype, at, static_cast<double>(value));
  }
  static Number conj(Number value) { return value; }
  static Scalar real(Number value) { return value; }
};

template <class Part>
struct Numbers<std::complex<Part>> {
  using Scalar = Part;
  using Number = std::complex<Part>;
  static constexpr Scalar kWeight = 2;

  static Number read(const TensorView& tensor, std::int64_t at) {
    const std::int64_t imaginary = at + tensor.stride[tensor.dim - 1];
    return {Numbers<Part>::read(tensor, at), Numbers<Part>::read(tensor, imaginary)};
  }
  static void write(const TensorView& tensor, std::int64_t at, Number value) {
    Numbers<Part>::write(tensor, at, value.real());
    Numbers<Part>::write(tensor, at + tensor.stride[tensor.dim - 1], value.imag());
  }
  static Number conj(Number value) { return std::conj(value); }
  static Scalar real(Number value) { return value.real(); }
};

template <class Number>
Number read(const TensorView& tensor, std::int64_t at) {
  return Numbers<Number>::read(tensor, at);
}

template <class Number>
void write(const TensorView& tensor, std::int64_t at, Number value) {
  Numbers<Number>::write(tensor, at, value);
}

// The inputs of one channel of one batch entry, one step or state at a time. Steps count in the
// order of the scan.
template <class Number>
class Channel {
  using Scalar = typename Numbers<Number>::Scalar;

 public:
  Channel(const Inputs& in, std::int64_t batch, std::int64_t channel)
      : in_(in), sequences_(sequences_of(in, batch)), batch_(batch), channel_(channel) {
    if (is_varying(in.B)) {
      group_ = channel / (in.u.size[1] / in.B.size[1]);
    } else if (is_varying(in.C)) {
      group_ = channel / (in.u.size[1] / in.C.size[1]);
    }
  }

  // Where a (B, D, L) tensor has step t.
  std::int64_t place(const TensorView& tensor, std::int64_t t) const {
    return offset(tensor, batch_, channel_, time(t));
  }

  Scalar u(std::int64_t t) const { return read<Scalar>(in_.u, place(in_.u, t)); }
  // delta before softplus
  Scalar raw(std::int64_t t) const { return read<Scalar>(in_.delta, place(in_.delta, t)) + bias(); }
  Scalar delta(std::int64_t t) const { return in_.delta_softplus ? softplus(raw(t)) : raw(t); }
  Scalar delta_slope(std::int64_t t) const {
    return in_.delta_softplus ? softplus_grad(raw(t)) : Scalar(1);
  }
  Scalar z(std::int64_t t) const { return read<Scalar>(in_.z, place(in_.z, t)); }
  Scalar gate(std::int64_t t) const { return in_.z.present() ? silu(z(t)) : Scalar(1); }
  Number A(std::int64_t n) const { return read<Number>(in_.A, offset(in_.A, channel_, n)); }
  Number B(std::int64_t n, std::int64_t t) const { return read<Number>(in_.B, place(in_.B, n, t)); }
  Number C(std::int64_t n, std::int64_t t) const { return read<Number>(in_.C, place(in_.C, n, t)); }
  Scalar D() const {
    return in_.D.present() ? read<Scalar>(in_.D, channel_ * in_.D.stride[0]) : Scalar(0);
  }
  // States of a (B or S, D, N) tensor; 0 where there is no such row or no tensor.
  Number state(const TensorView& tensor, std::int64_t row, std::int64_t n) const {
    return tensor.present() && row >= 0 ? read<Number>(tensor, offset(tensor, row, channel_, n))
                                        : Number(0);
  }
  void set_state(const TensorView& tensor, std::int64_t row, std::int64_t n, Number value) const {
    if (tensor.present() && row >= 0) {
      write(tensor, offset(tensor, row, channel_, n), value);
    }
  }
  const Sequences& sequences() const { return sequences_; }

  // Where B or C, or a gradient of its shape, has the element of state n and step t.
  std::int64_t place(const TensorView& tensor, std::int64_t n, std::int64_t t) const {
    return is_varying(tensor) ? offset(tensor, batch_, group_, n) + time(t) * tensor.stride[3]
                              : offset(tensor, channel_, n);
  }

 private:
  std::int64_t time(std::int64_t t) const { return in_.reverse ? in_.u.size[2] - 1 - t : t; }
  Scalar bias() const {
    return in_.delta_bias.present()
               ? read<Scalar>(in_.delta_bias, channel_ * in_.delta_bias.stride[0])
               : Scalar(0);
  }

  const Inputs& in_;
  Sequences sequences_;
  std::int64_t batch_;
  std::int64_t channel_;
  std::int64_t group_ = 0;
};

// Sums into a tensor: every element starts at 0 and is rounded to the tensor's dtype once, at the
// end.
template <class Scalar>
class Sums {
 public:
  explicit Sums(const TensorView& to) : to_(to) {
    if (to.present()) {
      std::int64_t last = 0;
      for (int i = 0; i < to.dim; ++i) {
        if (to.size[i] == 0) {
          return;
        }
        last += (to.size[i] - 1) * to.stride[i];
      }
      sums_.resize(static_cast<std::size_t>(last + 1));
    }
  }

  void add(std::int64_t at, Scalar value) { sums_[static_cast<std::size_t>(at)] += value; }
  void add(std::int64_t at, std::complex<Scalar> value) {
    add(at, value.real());
    add(at + to_.stride[to_.dim - 1], value.imag());
  }

  void store() const { store_from(0, 0); }

 private:
  void store_from(int dimension, std::int64_t at) const {
    if (sums_.empty()) {
      return;
    }
    if (dimension == to_.dim) {
      write<Scalar>(to_, at, sums_[static_cast<std::size_t>(at)]);
      return;
    }
    for (std::int64_t i = 0; i < to_.size[dimension]; ++i) {
      store_from(dimension + 1, at + i * to_.stride[dimension]);
    }
  }

  TensorView to_;
  std::vector<Scalar> sums_;
};

// What forward leaves for backward: one channel's states after every step, and its pre-gate output.
template <class Number>
struct Trace {
  using Scalar = typename Numbers<Number>::Scalar;

  Trace(std::int64_t length, std::int64_t state_count)
      : states(state_count),
        h(static_cast<std::size_t>((length + 1) * state_count)),
        y(static_cast<std::size_t>(length)) {}

  // h[t, n], with t = -1 for the state that enters at the first step.
  Number& state(std::int64_t t, std::int64_t n) {
    return h[static_cast<std::size_t>((t + 1) * states + n)];
  }
  // h[t-1, n], or what a sequence that begins at step t starts from.
  Number before(const Channel<Number>& channel, const TensorView& initial, std::int64_t t,
                std::int64_t n) {
    return channel.sequences().begins(t)
               ? channel.state(initial, channel.sequences().entering(t), n)
               : state(t - 1, n);
  }
  Scalar& output(std::int64_t t) { return y[static_cast<std::size_t>(t)]; }

  std::int64_t states;
  std::vector<Number> h;
  std::vector<Scalar> y;
};

template <class Number>
void run(const Channel<Number>& channel, const TensorView& initial, std::int64_t length,
         Trace<Number>& trace) {
  using Scalar = typename Numbers<Number>::Scalar;

  for (std::int64_t n = 0; length > 0 && n < trace.states; ++n) {
    trace.state(-1, n) = trace.before(channel, initial, 0, n);
  }
  for (std::int64_t t = 0; t < length; ++t) {
    const Scalar delta = channel.delta(t);
    const Scalar u = channel.u(t);
    Scalar y = channel.D() * u;
    for (std::int64_t n = 0; n < trace.states; ++n) {
      const Number decay = std::exp(delta * channel.A(n));
      const Number h = decay * trace.before(channel, initial, t, n) + delta * channel.B(n, t) * u;
      trace.state(t, n) = h;
      y += Numbers<Number>::kWeight * Numbers<Number>::real(channel.C(n, t) * h);
    }
    trace.output(t) = y;
  }
}

// What sequences without steps leave: the others overwrite theirs.
template <class Number>
void copy_states(const TensorView& to, const TensorView& from) {
  for (std::int64_t row = 0; to.present() && row < to.size[0]; ++row) {
    for (std::int64_t d = 0; d < to.size[1]; ++d) {
      for (std::int64_t n = 0; n < to.size[2]; ++n) {
        write(to, offset(to, row, d, n),
              from.present() ? read<Number>(from, offset(from, row, d, n)) : Number(0));
      }
    }
  }
}

template <class Number>
void forward_of(const ForwardParams& params) {
  const Inputs& in = params.in;
  const std::int64_t length = in.u.size[2];
  const std::int64_t states = in.A.size[1];
  Trace<Number> trace(length, states);
  copy_states<Number>(params.last_state, in.initial_state);
  for (std::int64_t b = 0; b < in.u.size[0]; ++b) {
    for (std::int64_t d = 0; d < in.u.size[1]; ++d) {
      const Channel<Number> channel(in, b, d);
      run(channel, in.initial_state, length, trace);
      for (std::int64_t t = 0; t < length; ++t) {
        for (std::int64_t n = 0; channel.sequences().ends(t) && n < states; ++n) {
          channel.set_state(params.last_state, channel.sequences().leaving(t), n,
                            trace.state(t, n));
        }
        write(params.out, channel.place(params.out, t), trace.output(t) * channel.gate(t));
      }
      for (std::int64_t n = 0; n < states; ++n) {
        for (std::int64_t k = 0; k < params.checkpoints.size[2]; ++k) {
          write(params.checkpoints,
                offset(params.checkpoints, b, d, k) + n * params.checkpoints.stride[3],
                trace.state(k * kCheckpointInterval - 1, n));
        }
      }
    }
  }
}

// The README derives it: q[t] = dL/dh[t] = C[t] g[t] + exp(delta[t+1] A) q[t+1], g = dL/dy, with
// conjugates of what a complex state is multiplied by.
template <class Number>
void backward_of(const BackwardParams& params) {
  using Of = Numbers<Number>;
  using Scalar = typename Of::Scalar;
  const Inputs& in = params.in;
  const std::int64_t length = in.u.size[2];
  const std::int64_t states = in.A.size[1];
  Sums<Scalar> dA(params.dA), dB(params.dB), dC(params.dC), dD(params.dD),
      ddelta_bias(params.ddelta_bias);
  Trace<Number> trace(length, states);
  std::vector<Number> carry(static_cast<std::size_t>(states));  // exp(delta[t+1] A) q[t+1]
  copy_states<Number>(params.dinitial_state, params.dlast_state);
  for (std::int64_t b = 0; b < in.u.size[0]; ++b) {
    for (std::int64_t d = 0; d < in.u.size[1]; ++d) {
      const Channel<Number> channel(in, b, d);
      run(channel, in.initial_state, length, trace);
      for (std::int64_t t = length - 1; t >= 0; --t) {
        const Scalar dout = read<Scalar>(params.dout, channel.place(params.dout, t));
        const Scalar g = dout * channel.gate(t);
        const Scalar delta = channel.delta(t);
        const Scalar u = channel.u(t);
        Scalar sum_qB = 0;
        Scalar sum_qAa = 0;
        for (std::int64_t n = 0; n < states; ++n) {
          const Number A = channel.A(n);
          const Number B = channel.B(n, t);
          const Number later =
              channel.sequences().ends(t)
                  ? channel.state(params.dlast_state, channel.sequences().leaving(t), n)
                  : carry[static_cast<std::size_t>(n)];
          const Scalar weighted_g = Of::kWeight * g;
          const Number q = Of::conj(channel.C(n, t)) * weighted_g + later;
          const Number decayed_q = Of::conj(std::exp(delta * A)) * q;
          const Number qa = decayed_q * Of::conj(trace.before(channel, in.initial_state, t, n));
          sum_qB += Of::real(q * Of::conj(B));
          sum_qAa += Of::real(qa * Of::conj(A));
          dA.add(offset(params.dA, d, n), qa * delta);
          dB.add(channel.place(params.dB, n, t), q * delta * u);
          dC.add(channel.place(params.dC, n, t), weighted_g * Of::conj(trace.state(t, n)));
          carry[static_cast<std::size_t>(n)] = decayed_q;
          if (channel.sequences().begins(t)) {
            channel.set_state(params.dinitial_state, channel.sequences().entering(t), n, decayed_q);
          }
        }
        const Scalar ddelta = channel.delta_slope(t) * (sum_qB * u + sum_qAa);
        write(params.du, channel.place(params.du, t), channel.D() * g + sum_qB * delta);
        write(params.ddelta, channel.place(params.ddelta, t), ddelta);
        if (in.D.present()) {
          dD.add(d * params.dD.stride[0], g * u);
        }
        if (in.delta_bias.present()) {
          ddelta_bias.add(d * params.ddelta_bias.stride[0], ddelta);
        }
        if (in.z.present()) {
          write(params.dz, channel.place(params.dz, t),
                dout * trace.output(t) * silu_grad(channel.z(t)));
        }
      }
    }
  }
  for (const Sums<Scalar>* sums : {&dA, &dB, &dC, &dD, &ddelta_bias}) {
    sums->store();
  }
}

}  // namespace

template <class Scalar>
void forward(const ForwardParams& params) {
  params.in.is_complex() ? forward_of<std::complex<Scalar>>(params) : forward_of<Scalar>(params);
}

template <class Scalar>
void backward(const BackwardParams& params) {
  params.in.is_complex() ? backward_of<std::complex<Scalar>>(params) : backward_of<Scalar>(params);
}

template void forward<float>(const ForwardParams&);
template void forward<double>(const ForwardParams&);
template void backward<float>(const BackwardParams&);
template void backward<double>(const BackwardParams&);

}  // namespace mamba_native::selective_scan::reference
