#include "ssd/reference.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "core/math.h"
#include "core/sequences.h"
#include "ssd/scan_order.h"

namespace mamba_native::ssd::reference {
namespace {

template <class... Index>
std::int64_t offset(const TensorView& tensor, Index... index) {
  std::int64_t at = 0;
  int dimension = 0;
  ((at += index * tensor.stride[dimension++]), ...);
  return at;
}

template <class Scalar, class... Index>
Scalar read(const TensorView& tensor, Index... index) {
  return static_cast<Scalar>(load_double(tensor.data, tensor.dtype, offset(tensor, index...)));
}

template <class Scalar, class... Index>
void write(Scalar value, const TensorView& tensor, Index... index) {
  store_float(tensor.data, tensor.dtype, offset(tensor, index...), static_cast<double>(value));
}

template <class Scalar>
using Array = std::vector<Scalar>;

template <class Scalar>
Array<Scalar> zeros(std::int64_t count) {
  return Array<Scalar>(static_cast<std::size_t>(count));
}

// A state or an adjoint of one, (P, N), of one batch entry and head.
template <class Scalar>
class State {
 public:
  State(const Inputs& in, std::int64_t head)
      : head_(head), P_(in.x.size[3]), N_(in.B.size[3]), values_(zeros<Scalar>(P_ * N_)) {}

  Scalar& operator()(std::int64_t p, std::int64_t n) {
    return values_[static_cast<std::size_t>(p * N_ + n)];
  }

  // From a (rows, H, P, N) tensor; 0 where there is no such row or no tensor.
  void load(const TensorView& tensor, std::int64_t row) {
    for (std::int64_t p = 0; p < P_; ++p) {
      for (std::int64_t n = 0; n < N_; ++n) {
        (*this)(p, n) =
            tensor.present() && row >= 0 ? read<Scalar>(tensor, row, head_, p, n) : Scalar(0);
      }
    }
  }
  void store(const TensorView& tensor, std::int64_t row) {
    for (std::int64_t p = 0; tensor.present() && row >= 0 && p < P_; ++p) {
      for (std::int64_t n = 0; n < N_; ++n) {
        write((*this)(p, n), tensor, row, head_, p, n);
      }
    }
  }
  // As the state before block k of the checkpoints.
  void store_checkpoint(const TensorView& tensor, std::int64_t batch, std::int64_t k) {
    for (std::int64_t p = 0; tensor.present() && p < P_; ++p) {
      for (std::int64_t n = 0; n < N_; ++n) {
        write((*this)(p, n), tensor, batch, k, head_, p, n);
      }
    }
  }

 private:
  std::int64_t head_;
  std::int64_t P_;
  std::int64_t N_;
  Array<Scalar> values_;
};

// What one step of one head reads.
template <class Scalar>
struct Step {
  Step(const Inputs& inputs, std::int64_t batch_entry, std::int64_t of_head)
      : in(inputs),
        batch(batch_entry),
        head(of_head),
        group(head / (in.x.size[2] / in.B.size[2])),
        P(in.x.size[3]),
        N(in.B.size[3]),
        A(read<Scalar>(in.A, head)),
        x(zeros<Scalar>(P)),
        D(zeros<Scalar>(P)),
        z(zeros<Scalar>(P)),
        B(zeros<Scalar>(N)),
        C(zeros<Scalar>(N)) {
    for (std::int64_t p = 0; in.D.present() && p < P; ++p) {
      D[static_cast<std::size_t>(p)] =
          in.D.dim == 2 ? read<Scalar>(in.D, head, p) : read<Scalar>(in.D, head);
    }
  }

  void load(std::int64_t t) {
    for (std::int64_t p = 0; p < P; ++p) {
      x[static_cast<std::size_t>(p)] = read<Scalar>(in.x, batch, t, head, p);
      if (in.z.present()) {
        z[static_cast<std::size_t>(p)] = read<Scalar>(in.z, batch, t, head, p);
      }
    }
    for (std::int64_t n = 0; n < N; ++n) {
      B[static_cast<std::size_t>(n)] = read<Scalar>(in.B, batch, t, group, n);
      C[static_cast<std::size_t>(n)] = read<Scalar>(in.C, batch, t, group, n);
    }
    const Scalar low = static_cast<Scalar>(in.dt_min);
    const Scalar high = static_cast<Scalar>(in.dt_max);
    Scalar raw = read<Scalar>(in.dt, batch, t, head);
    raw += in.dt_bias.present() ? read<Scalar>(in.dt_bias, head) : Scalar(0);
    const Scalar free = in.dt_softplus ? softplus(raw) : raw;
    delta = free < low ? low : free > high ? high : free;
    slope = free < low || free > high ? Scalar(0) : in.dt_softplus ? softplus_grad(raw) : Scalar(1);
    decay = std::exp(delta * A);
  }

  Scalar gate(std::size_t p) const { return in.z.present() ? silu(z[p]) : Scalar(1); }

  // One step of the recurrence.
  void advance(State<Scalar>& state) const {
    for (std::int64_t p = 0; p < P; ++p) {
      const Scalar drive = delta * x[static_cast<std::size_t>(p)];
      for (std::int64_t n = 0; n < N; ++n) {
        state(p, n) = decay * state(p, n) + drive * B[static_cast<std::size_t>(n)];
      }
    }
  }

  const Inputs& in;
  std::int64_t batch;
  std::int64_t head;
  std::int64_t group;
  std::int64_t P;
  std::int64_t N;
  Scalar A;
  Scalar delta = 0;
  Scalar slope = 0;  // d delta / d dt
  Scalar decay = 0;
  Array<Scalar> x, D, z;  // (P)
  Array<Scalar> B, C;     // (N)
};

// What sequences without steps leave: the others overwrite theirs.
void copy_states(const TensorView& to, const TensorView& from) {
  for (std::int64_t row = 0; to.present() && row < to.size[0]; ++row) {
    for (std::int64_t h = 0; h < to.size[1]; ++h) {
      for (std::int64_t p = 0; p < to.size[2]; ++p) {
        for (std::int64_t n = 0; n < to.size[3]; ++n) {
          write(from.present() ? read<double>(from, row, h, p, n) : 0.0, to, row, h, p, n);
        }
      }
    }
  }
}

template <class Scalar>
void backward_of_head(const BackwardParams& params, std::int64_t b, std::int64_t h,
                      Array<Scalar>& dA, Array<Scalar>& dD, Array<Scalar>& ddt_bias,
                      Array<Scalar>& dB, Array<Scalar>& dC) {
  const Inputs& in = params.in;
  const std::int64_t length = in.x.size[1];
  const std::int64_t groups = in.B.size[2];
  const Sequences sequences(in.seq_idx, b, length, in.sequences);
  Step<Scalar> step(in, b, h);
  const std::int64_t P = step.P, N = step.N;

  std::vector<State<Scalar>> checkpoints;
  State<Scalar> state(in, h);
  for (std::int64_t t = 0; t < length; ++t) {
    if (t % kCheckpointInterval == 0) {
      checkpoints.push_back(state);
    }
    if (sequences.begins(t)) {
      state.load(in.initial_states, sequences.entering(t));
    }
    step.load(t);
    step.advance(state);
  }

  // q[t] = dL/dS[t] = g[t] C[t]^T + exp(delta[t+1] A) q[t+1], g = dL/dy; the README derives it.
  State<Scalar> carry(in, h);  // exp(delta[t+1] A) q[t+1]
  for (std::int64_t k = static_cast<std::int64_t>(checkpoints.size()) - 1; k >= 0; --k) {
    const std::int64_t begin = k * kCheckpointInterval;
    const std::int64_t end = std::min(length, begin + kCheckpointInterval);
    std::vector<State<Scalar>> entering;  // the state before each step of the block
    state = checkpoints[static_cast<std::size_t>(k)];
    for (std::int64_t t = begin; t < end; ++t) {
      if (sequences.begins(t)) {
        state.load(in.initial_states, sequences.entering(t));
      }
      entering.push_back(state);
      step.load(t);
      step.advance(state);
    }
    for (std::int64_t t = end - 1; t >= begin; --t) {
      State<Scalar>& before = entering[static_cast<std::size_t>(t - begin)];
      if (sequences.ends(t)) {
        carry.load(params.dlast_states, sequences.leaving(t));
      }
      step.load(t);
      const std::size_t row = static_cast<std::size_t>((t * groups + step.group) * N);
      Scalar exponent = 0;  // dL / d(delta A)
      Scalar ddelta = 0;
      for (std::int64_t i = 0; i < P; ++i) {
        const std::size_t p = static_cast<std::size_t>(i);
        const Scalar dout = read<Scalar>(params.dout, b, t, h, i);
        const Scalar g = dout * step.gate(p);
        const Scalar x = step.x[p];
        Scalar y = step.D[p] * x;
        Scalar sum_qB = 0;
        for (std::int64_t j = 0; j < N; ++j) {
          const std::size_t n = static_cast<std::size_t>(j);
          const Scalar S = step.decay * before(i, j) + step.delta * x * step.B[n];
          const Scalar q = g * step.C[n] + carry(i, j);
          const Scalar decayed_q = step.decay * q;
          y += S * step.C[n];
          sum_qB += q * step.B[n];
          exponent += decayed_q * before(i, j);
          dB[row + n] += q * step.delta * x;
          dC[row + n] += g * S;
          carry(i, j) = decayed_q;
        }
        ddelta += sum_qB * x;
        write(step.delta * sum_qB + step.D[p] * g, params.dx, b, t, h, i);
        dD[static_cast<std::size_t>(h * P) + p] += g * x;
        if (in.z.present()) {
          write(dout * y * silu_grad(step.z[p]), params.dz, b, t, h, i);
        }
      }
      if (sequences.begins(t)) {
        carry.store(params.dinitial_states, sequences.entering(t));
      }
      const Scalar ddt = step.slope * (ddelta + step.A * exponent);
      write(ddt, params.ddt, b, t, h);
      dA[static_cast<std::size_t>(h)] += step.delta * exponent;
      ddt_bias[static_cast<std::size_t>(h)] += ddt;
    }
  }
}

// One batch entry's sums over the heads of a group, (L, G, N), into dB or dC.
template <class Scalar>
void store_projection(const Array<Scalar>& sums, const TensorView& to, std::int64_t b) {
  auto sum = sums.begin();
  for (std::int64_t t = 0; t < to.size[1]; ++t) {
    for (std::int64_t g = 0; g < to.size[2]; ++g) {
      for (std::int64_t n = 0; n < to.size[3]; ++n) {
        write(*sum++, to, b, t, g, n);
      }
    }
  }
}

}  // namespace

template <class Scalar>
void forward(const ForwardParams& given) {
  const ForwardParams params = in_scan_order(given);
  const Inputs& in = params.in;
  const std::int64_t length = in.x.size[1];
  copy_states(params.last_states, in.initial_states);
  for (std::int64_t b = 0; b < in.x.size[0]; ++b) {
    const Sequences sequences(in.seq_idx, b, length, in.sequences);
    for (std::int64_t h = 0; h < in.x.size[2]; ++h) {
      Step<Scalar> step(in, b, h);
      State<Scalar> state(in, h);
      for (std::int64_t t = 0; t < length; ++t) {
        if (t > 0 && t % kCheckpointInterval == 0) {
          state.store_checkpoint(params.checkpoints, b, t / kCheckpointInterval);
        }
        if (sequences.begins(t)) {
          state.load(in.initial_states, sequences.entering(t));
        }
        if (t == 0) {
          state.store_checkpoint(params.checkpoints, b, 0);
        }
        step.load(t);
        step.advance(state);
        for (std::int64_t p = 0; p < step.P; ++p) {
          const std::size_t at = static_cast<std::size_t>(p);
          Scalar y = step.D[at] * step.x[at];
          for (std::int64_t n = 0; n < step.N; ++n) {
            y += state(p, n) * step.C[static_cast<std::size_t>(n)];
          }
          write(y * step.gate(at), params.out, b, t, h, p);
        }
        if (sequences.ends(t)) {
          state.store(params.last_states, sequences.leaving(t));
        }
      }
    }
  }
}

template <class Scalar>
void backward(const BackwardParams& given) {
  const BackwardParams params = in_scan_order(given);
  const Inputs& in = params.in;
  const std::int64_t heads = in.x.size[2], P = in.x.size[3];
  Array<Scalar> dA = zeros<Scalar>(heads), ddt_bias = dA, dD = zeros<Scalar>(heads * P);
  copy_states(params.dinitial_states, params.dlast_states);
  for (std::int64_t b = 0; b < in.x.size[0]; ++b) {
    Array<Scalar> dB = zeros<Scalar>(in.x.size[1] * in.B.size[2] * in.B.size[3]), dC = dB;
    for (std::int64_t h = 0; h < heads; ++h) {
      backward_of_head(params, b, h, dA, dD, ddt_bias, dB, dC);
    }
    store_projection(dB, params.dB, b);
    store_projection(dC, params.dC, b);
  }
  for (std::int64_t h = 0; h < heads; ++h) {
    write(dA[static_cast<std::size_t>(h)], params.dA, h);
    if (in.dt_bias.present()) {
      write(ddt_bias[static_cast<std::size_t>(h)], params.ddt_bias, h);
    }
    Scalar sum = 0;
    for (std::int64_t p = 0; p < P; ++p) {
      const Scalar of_channel = dD[static_cast<std::size_t>(h * P + p)];
      sum += of_channel;
      if (in.D.dim == 2) {
        write(of_channel, params.dD, h, p);
      }
    }
    if (in.D.dim == 1) {
      write(sum, params.dD, h);
    }
  }
}

template void forward<float>(const ForwardParams&);
template void forward<double>(const ForwardParams&);
template void backward<float>(const BackwardParams&);
template void backward<double>(const BackwardParams&);

}  // namespace mamba_native::ssd::reference
