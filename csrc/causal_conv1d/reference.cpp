// The mathematics of causal_conv1d.h, written down: every output is one sum over taps, every
// gradient the transpose of one. Speed does not matter here.
#include "causal_conv1d/reference.h"

#include <algorithm>
#include <vector>

#include "core/math.h"

namespace mamba_native::causal_conv1d::reference {
namespace {

std::int64_t offset(const TensorView& tensor, std::int64_t i, std::int64_t j = 0,
                    std::int64_t k = 0) {
  return i * tensor.stride[0] + (tensor.dim > 1 ? j * tensor.stride[1] : 0) +
         (tensor.dim > 2 ? k * tensor.stride[2] : 0);
}

template <class Scalar>
Scalar get(const TensorView& tensor, std::int64_t i, std::int64_t j = 0, std::int64_t k = 0) {
  return static_cast<Scalar>(load_double(tensor.data, tensor.dtype, offset(tensor, i, j, k)));
}

template <class Scalar>
void set(const TensorView& tensor, Scalar value, std::int64_t i, std::int64_t j = 0,
         std::int64_t k = 0) {
  store_float(tensor.data, tensor.dtype, offset(tensor, i, j, k), static_cast<double>(value));
}

std::int64_t get_index(const TensorView& tensor, std::int64_t i, std::int64_t j = 0) {
  return load_index(tensor.data, tensor.dtype, offset(tensor, i, j));
}

// One convolution with every tap and mask spelled out.
template <class Scalar>
struct Convolution {
  const Inputs& in;
  std::int64_t length = in.x.size[2];
  std::int64_t width = in.weight.size[1];

  // Column t of [initial_states, x]: t >= -(W-1).
  Scalar column(std::int64_t b, std::int64_t d, std::int64_t t) const {
    if (t >= 0) {
      return get<Scalar>(in.x, b, d, t);
    }
    return in.initial_states.present() ? get<Scalar>(in.initial_states, b, d, t + width - 1)
                                       : Scalar(0);
  }

  bool is_padding(std::int64_t b, std::int64_t t) const {
    return in.seq_idx.present() && get_index(in.seq_idx, b, t) < 0;
  }

  // Whether the output at t sees the column at `tap`; initial states are of position 0's sequence.
  bool sees(std::int64_t b, std::int64_t t, std::int64_t tap) const {
    return !in.seq_idx.present() ||
           (!is_padding(b, t) && get_index(in.seq_idx, b, std::max<std::int64_t>(tap, 0)) ==
                                     get_index(in.seq_idx, b, t));
  }

  // The column that column j of the final states comes from, and whether it is not masked.
  std::int64_t final_column(std::int64_t j) const { return length - (width - 1) + j; }
  bool keeps_final(std::int64_t b, std::int64_t j) const {
    return length == 0 || sees(b, length - 1, final_column(j));
  }

  Scalar pre_activation(std::int64_t b, std::int64_t d, std::int64_t t) const {
    Scalar p = in.bias.present() ? get<Scalar>(in.bias, d) : Scalar(0);
    for (std::int64_t w = 0; w < width; ++w) {
      const std::int64_t tap = t - (width - 1 - w);
      if (sees(b, t, tap)) {
        p += get<Scalar>(in.weight, d, w) * column(b, d, tap);
      }
    }
    return p;
  }
};

}  // namespace

template <class Scalar>
void forward(const ForwardParams& params) {
  const Convolution<Scalar> conv{params.in};
  const std::int64_t length = conv.length;
  for (std::int64_t b = 0; b < params.in.x.size[0]; ++b) {
    for (std::int64_t d = 0; d < params.in.x.size[1]; ++d) {
      for (std::int64_t t = 0; t < length; ++t) {
        const Scalar p = conv.pre_activation(b, d, t);
        const Scalar out = params.in.silu ? silu(p) : p;
        set(params.out, conv.is_padding(b, t) ? Scalar(0) : out, b, d, t);
      }
      if (params.final_states.present()) {
        for (std::int64_t j = 0; j < conv.width - 1; ++j) {
          set(params.final_states,
              conv.keeps_final(b, j) ? conv.column(b, d, conv.final_column(j)) : Scalar(0), b, d,
              j);
        }
      }
    }
  }
}

template <class Scalar, class Sum>
void backward(const BackwardParams& params) {
  const Convolution<Scalar> conv{params.in};
  const std::int64_t length = conv.length;
  const std::int64_t width = conv.width;
  const std::int64_t halo = width - 1;
  std::vector<Scalar> dcolumn(static_cast<std::size_t>(halo + length));  // of [initial_states, x]
  for (std::int64_t d = 0; d < params.in.x.size[1]; ++d) {
    std::vector<Sum> dweight(static_cast<std::size_t>(width), Sum(0));
    Sum dbias = 0;
    for (std::int64_t b = 0; b < params.in.x.size[0]; ++b) {
      std::fill(dcolumn.begin(), dcolumn.end(), Scalar(0));
      for (std::int64_t t = 0; t < length; ++t) {
        if (conv.is_padding(b, t)) {
          continue;
        }
        Scalar dp = get<Scalar>(params.dout, b, d, t);
        if (params.in.silu) {
          dp *= silu_grad(conv.pre_activation(b, d, t));
        }
        dbias += dp;
        for (std::int64_t w = 0; w < width; ++w) {
          const std::int64_t tap = t - (halo - w);
          if (conv.sees(b, t, tap)) {
            dweight[static_cast<std::size_t>(w)] += dp * conv.column(b, d, tap);
            dcolumn[static_cast<std::size_t>(halo + tap)] +=
                dp * get<Scalar>(params.in.weight, d, w);
          }
        }
      }
      if (params.dfinal_states.present()) {
        for (std::int64_t j = 0; j < halo; ++j) {
          if (conv.keeps_final(b, j)) {
            dcolumn[static_cast<std::size_t>(length + j)] +=
                get<Scalar>(params.dfinal_states, b, d, j);
          }
        }
      }
      for (std::int64_t j = 0; j < halo && params.dinitial_states.present(); ++j) {
        set(params.dinitial_states, dcolumn[static_cast<std::size_t>(j)], b, d, j);
      }
      for (std::int64_t t = 0; t < length; ++t) {
        set(params.dx, dcolumn[static_cast<std::size_t>(halo + t)], b, d, t);
      }
    }
    for (std::int64_t w = 0; w < width; ++w) {
      set(params.dweight, dweight[static_cast<std::size_t>(w)], d, w);
    }
    if (params.dbias.present()) {
      set(params.dbias, dbias, d);
    }
  }
}

template <class Scalar>
void update(const UpdateParams& params) {
  const TensorView& state = params.conv_state;
  const std::int64_t tokens = params.x.size[2];
  const std::int64_t state_len = state.size[2];
  const std::int64_t width = params.weight.size[1];
  const std::int64_t halo = width - 1;
  const bool circular = params.cache_seqlens.present();
  std::vector<Scalar> line;  // the context, then the new tokens
  for (std::int64_t b = 0; b < params.x.size[0]; ++b) {
    const std::int64_t entry =
        params.conv_state_indices.present() ? get_index(params.conv_state_indices, b) : b;
    // Where the first new token goes; a linear buffer keeps its newest column last.
    const std::int64_t start =
        circular ? get_index(params.cache_seqlens, b) % state_len : state_len;
    for (std::int64_t d = 0; d < params.x.size[1]; ++d) {
      if (entry < 0) {
        for (std::int64_t i = 0; i < tokens; ++i) {
          set(params.out, Scalar(0), b, d, i);
        }
        continue;
      }
      line.clear();
      const std::int64_t context = circular ? halo : state_len;
      for (std::int64_t j = 0; j < context; ++j) {
        const std::int64_t column = circular ? (start - halo + j + state_len) % state_len : j;
        line.push_back(get<Scalar>(state, entry, d, column));
      }
      for (std::int64_t i = 0; i < tokens; ++i) {
        line.push_back(get<Scalar>(params.x, b, d, i));
      }
      for (std::int64_t i = 0; i < tokens; ++i) {
        Scalar p = params.bias.present() ? get<Scalar>(params.bias, d) : Scalar(0);
        for (std::int64_t w = 0; w < width; ++w) {
          p += get<Scalar>(params.weight, d, w) *
               line[static_cast<std::size_t>(context + i - (halo - w))];
        }
        set(params.out, params.silu ? silu(p) : p, b, d, i);
      }
      if (circular) {
        for (std::int64_t i = 0; i < tokens; ++i) {
          set(state, line[static_cast<std::size_t>(halo + i)], entry, d, (start + i) % state_len);
        }
      } else {
        for (std::int64_t j = 0; j < state_len; ++j) {
          set(state, line[static_cast<std::size_t>(tokens + j)], entry, d, j);
        }
      }
    }
  }
}

void varlen_states(const VarlenStatesParams& params) {
  const TensorView& states = params.states;
  for (std::int64_t s = 0; s < states.size[0]; ++s) {
    const std::int64_t begin = get_index(params.cu_seqlens, s);
    const std::int64_t end = get_index(params.cu_seqlens, s + 1);
    for (std::int64_t d = 0; d < states.size[1]; ++d) {
      for (std::int64_t j = 0; j < states.size[2]; ++j) {
        const std::int64_t token = end - states.size[2] + j;
        set(states, token >= begin ? get<double>(params.x, token, d) : 0.0, s, d, j);
      }
    }
  }
}

template void forward<float>(const ForwardParams&);
template void forward<double>(const ForwardParams&);
template void backward<float>(const BackwardParams&);
template void backward<double>(const BackwardParams&);
template void backward<float, double>(const BackwardParams&);
template void update<float>(const UpdateParams&);
template void update<double>(const UpdateParams&);

}  // namespace mamba_native::causal_conv1d::reference
