#include "causal_conv1d/cpu.h"

#include <algorithm>
#include <utility>

#include "causal_conv1d/plan.h"
#include "causal_conv1d/reference.h"
#include "core/error.h"
#include "core/math.h"
#include "core/parallel_for.h"

namespace mamba_native::causal_conv1d::cpu {
namespace {

constexpr std::int64_t kSegment = 256;  // steps of a task along channels

const Kernels& kernels_of(Isa isa) {
  return mamba_native::cpu::kernels_for(isa, kSse2Kernels, kAvx2Kernels, kAvx512Kernels);
}

const KernelsOfWidth& kernels_of(Isa isa, std::int64_t width) {
  const Kernels& kernels = kernels_of(isa);
  return width <= 4 ? kernels.for_width[width - 2] : kernels.for_any_width;
}

// A line of channels of one column: the first element and the distance to the next.
struct Line {
  char* first;
  std::int64_t step;  // in elements
};

Line line(const TensorView& tensor, std::int64_t b, std::int64_t d, std::int64_t column) {
  const std::int64_t offset =
      b * tensor.stride[0] + d * tensor.stride[1] + column * tensor.stride[2];
  return {tensor.as<char>() + offset * size_of(tensor.dtype), tensor.stride[1]};
}

template <class Bits>
void copy_bits(const Line& to, const Line& from, std::int64_t count) {
  Bits* target = reinterpret_cast<Bits*>(to.first);
  const Bits* source = reinterpret_cast<const Bits*>(from.first);
  for (std::int64_t i = 0; i < count; ++i) {
    target[i * to.step] = source[i * from.step];
  }
}

// Copies `count` elements of a CPU kernel's dtypes, which have 2 or 4 bytes.
void copy_line(const Line& to, const Line& from, std::int64_t count, DType dtype) {
  if (size_of(dtype) == 2) {
    copy_bits<std::uint16_t>(to, from, count);
  } else {
    copy_bits<std::uint32_t>(to, from, count);
  }
}

// +0 in every dtype, for as long a line as needed.
Line zeros() {
  static std::uint32_t zero = 0;
  return {reinterpret_cast<char*>(&zero), 0};
}

// The last W-1 columns of [initial_states, x], those of other sequences than the last being 0.
void write_final_states(const ForwardParams& params) {
  const TensorView& x = params.in.x;
  const TensorView& initial = params.in.initial_states;
  const std::int64_t halo = params.final_states.size[2];
  for (std::int64_t b = 0; b < x.size[0]; ++b) {
    for (std::int64_t j = 0; j < halo; ++j) {
      const std::int64_t t = x.size[2] - halo + j;
      const Line from = !is_of_last_sequence(params.in, b, t) ? zeros()
                        : t >= 0                              ? line(x, b, 0, t)
                        : initial.present()                   ? line(initial, b, 0, t + halo)
                                                              : zeros();
      copy_line(line(params.final_states, b, 0, j), from, x.size[1], x.dtype);
    }
  }
}

// Elements first, first + 1, ... of one dimension.
TensorView slice(TensorView tensor, int dim, std::int64_t first, std::int64_t count) {
  if (tensor.present()) {
    tensor.data = tensor.as<char>() + first * tensor.stride[dim] * size_of(tensor.dtype);
    tensor.size[dim] = count;
  }
  return tensor;
}

// A decode step of one sequence and one block of channels: a convolution whose initial states are
// the context in the buffer, then the buffer's turn.
void update_block(const KernelsOfWidth& kernels, const UpdateParams& params, std::int64_t b,
                  std::int64_t index) {
  const TensorView& state = params.conv_state;
  const std::int64_t tokens = params.x.size[2];
  const std::int64_t state_len = state.size[2];
  const std::int64_t halo = params.weight.size[1] - 1;
  const std::int64_t first = index * kForwardChannels;
  const std::int64_t channels = std::min<std::int64_t>(kForwardChannels, params.x.size[1] - first);
  const TensorView& indices = params.conv_state_indices;
  const std::int64_t row =
      indices.present() ? indices.as<const std::int32_t>()[b * indices.stride[0]] : b;
  if (row < 0) {
    for (std::int64_t i = 0; i < tokens; ++i) {
      copy_line(line(params.out, b, first, i), zeros(), channels, state.dtype);
    }
    return;
  }
  const TensorView& seqlens = params.cache_seqlens;
  const bool circular = seqlens.present();
  const std::int64_t start =
      circular ? seqlens.as<const std::int32_t>()[b * seqlens.stride[0]] % state_len : state_len;

  // A copy, because a circular context wraps and the buffer changes below.
  std::uint32_t context[(kMaxWidth - 1) * kForwardChannels];
  ForwardParams conv;
  conv.in.initial_states = TensorView(context, state.dtype, {1, halo, channels});
  std::swap(conv.in.initial_states.size[1], conv.in.initial_states.size[2]);
  std::swap(conv.in.initial_states.stride[1], conv.in.initial_states.stride[2]);
  for (std::int64_t j = 0; j < halo; ++j) {
    copy_line(line(conv.in.initial_states, 0, 0, j),
              line(state, row, first, (start - halo + j + state_len) % state_len), channels,
              state.dtype);
  }
  conv.in.x = slice(slice(params.x, 0, b, 1), 1, first, channels);
  conv.in.weight = slice(params.weight, 0, first, channels);
  conv.in.bias = slice(params.bias, 0, first, channels);
  conv.in.silu = params.silu;
  conv.out = slice(slice(params.out, 0, b, 1), 1, first, channels);
  kernels.forward_block(conv, 0, 0, 0, tokens);

  if (circular) {
    for (std::int64_t i = 0; i < tokens; ++i) {
      copy_line(line(state, row, first, (start + i) % state_len), line(params.x, b, first, i),
                channels, state.dtype);
    }
    return;
  }
  for (std::int64_t j = 0; j < state_len; ++j) {
    const std::int64_t from = j + tokens;  // column of [conv_state, x]
    copy_line(line(state, row, first, j),
              from < state_len ? line(state, row, first, from)
                               : line(params.x, b, first, from - state_len),
              channels, state.dtype);
  }
}

}  // namespace

bool is_of_last_sequence(const Inputs& in, std::int64_t b, std::int64_t column) {
  const TensorView& seq_idx = in.seq_idx;
  const std::int64_t length = in.x.size[2];
  if (!seq_idx.present() || length == 0) {
    return true;
  }
  const std::int32_t* row = seq_idx.as<const std::int32_t>() + b * seq_idx.stride[0];
  const std::int32_t last = row[(length - 1) * seq_idx.stride[1]];
  return last >= 0 && row[std::max<std::int64_t>(column, 0) * seq_idx.stride[1]] == last;
}

void forward(const ForwardParams& params, Isa isa) {
  if (isa == Isa::plain) {
    reference::forward<float>(params);
    return;
  }
  const KernelsOfWidth& kernels = kernels_of(isa, params.in.weight.size[1]);
  const TensorView& x = params.in.x;
  const std::int64_t channels = x.size[1];
  const std::int64_t length = x.size[2];
  if (is_channel_last(x)) {
    const std::int64_t blocks = ceil_div(channels, kForwardChannels);
    const std::int64_t segments = ceil_div(length, kSegment);
    parallel_for(x.size[0] * segments * blocks,
                 grain_of(kForwardChannels * std::min(length, kSegment)),
                 [&](std::int64_t begin, std::int64_t end) {
                   for (std::int64_t i = begin; i < end; ++i) {
                     const std::int64_t t = i / blocks % segments * kSegment;
                     kernels.forward_block(params, i / blocks / segments, i % blocks, t,
                                           std::min(length, t + kSegment));
                   }
                 });
  } else {
    parallel_for(x.size[0] * channels, grain_of(length), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        kernels.forward_row(params, i / channels, i % channels);
      }
    });
  }
  if (params.final_states.present()) {
    write_final_states(params);
  }
}

// Tasks own whole channels, so that sums over batch and time have one order and no rivals.
void backward(const BackwardParams& params, Isa isa) {
  if (isa == Isa::plain) {
    reference::backward<float, double>(params);
    return;
  }
  const KernelsOfWidth& kernels = kernels_of(isa, params.in.weight.size[1]);
  const TensorView& x = params.in.x;
  const std::int64_t per_channel = x.size[0] * x.size[2];
  if (is_channel_last(x)) {
    parallel_for(ceil_div(x.size[1], kBackwardChannels), grain_of(per_channel * kBackwardChannels),
                 [&](std::int64_t begin, std::int64_t end) {
                   for (std::int64_t i = begin; i < end; ++i) {
                     kernels.backward_block(params, i);
                   }
                 });
  } else {
    parallel_for(x.size[1], grain_of(per_channel), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t d = begin; d < end; ++d) {
        kernels.backward_row(params, d);
      }
    });
  }
}

void update(const UpdateParams& params, Isa isa) {
  if (isa == Isa::plain) {
    reference::update<float>(params);
    return;
  }
  const KernelsOfWidth& kernels = kernels_of(isa, params.weight.size[1]);
  const TensorView& x = params.x;
  const std::int64_t blocks = ceil_div(x.size[1], kForwardChannels);
  // Sequences that share a row of conv_state have no defined result, but they must not race.
  const bool may_share = params.conv_state_indices.present();
  const std::int64_t outer = may_share ? 1 : x.size[0];
  const std::int64_t inner = may_share ? x.size[0] : 1;
  parallel_for(outer * blocks, grain_of(inner * kForwardChannels * x.size[2]),
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t i = begin; i < end; ++i) {
                   for (std::int64_t b = 0; b < inner; ++b) {
                     update_block(kernels, params, i / blocks + b, i % blocks);
                   }
                 }
               });
}

}  // namespace mamba_native::causal_conv1d::cpu
