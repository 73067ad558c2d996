// The convolution with SIMD, for one instruction set per translation unit. Everything is staged
// through float lines that live in the L1 cache, which is where dtypes, strides, initial states and
// ragged ends are dealt with; the arithmetic then runs on whole vectors:
//
//   along time      a line is up to kTimeBlock steps of one channel; tap w is the line shifted by
//                   W-1-w, its weight one number
//   along channels  a line is a block of channels of one step; tap w is the line of an
//                   earlier step, kept in a ring, its weight a vector. A masked tap reads a line of
//                   zeros, so seq_idx costs nothing here
//
// Widths 2, 3 and 4 have kernels of their own; those of kMaxWidth serve every other width, whose
// oldest taps are missing: their loops begin at first_tap.
//
// Only templates on Arch and nothing from the standard library that has code: no symbol compiled
// for one instruction set may be shared with another.
#pragma once

#include <cstdint>

#include "causal_conv1d/cpu.h"
#include "core/cpu/simd.h"

namespace mamba_native::causal_conv1d::cpu {
namespace kernel {

using mamba_native::cpu::kLanes;
using mamba_native::cpu::Vec;

inline constexpr int kPad = 16;  // room for the taps before a line, a multiple of every vector
inline constexpr int kTimeLine = kPad + kTimeBlock + kPad;

// The first of the WIDTH taps that the weight has; what it has none of is neither read nor added.
template <class Arch, int WIDTH>
MAMBA_ALWAYS_INLINE int first_tap(const Inputs& in) {
  return WIDTH < kMaxWidth ? 0 : WIDTH - static_cast<int>(in.weight.size[1]);
}

// ------------------------------------------------------------------------------------- lines

template <class Arch, class T>
MAMBA_ALWAYS_INLINE void read_elements(const T* from, std::int64_t step, int count, float* to) {
  int i = 0;
  if (step == 1) {
    for (; i + kLanes<Arch> <= count; i += kLanes<Arch>) {
      mamba_native::cpu::load<Arch>(from + i).store_unaligned(to + i);
    }
  }
  for (; i < count; ++i) {
    to[i] = to_float(from[i * step]);
  }
}

// `count` elements from `offset` on, `step` apart.
template <class Arch>
void read_line(const TensorView& tensor, std::int64_t offset, std::int64_t step, int count,
               float* to) {
  switch (tensor.dtype) {
    case DType::f32:
      read_elements<Arch>(tensor.as<const float>() + offset, step, count, to);
      return;
    case DType::f16:
      read_elements<Arch>(tensor.as<const Half>() + offset, step, count, to);
      return;
    default:
      read_elements<Arch>(tensor.as<const BFloat16>() + offset, step, count, to);
      return;
  }
}

template <class Arch, class T>
MAMBA_ALWAYS_INLINE void write_elements(const float* from, T* to, std::int64_t step, int count) {
  int i = 0;
  if (step == 1) {
    for (; i + kLanes<Arch> <= count; i += kLanes<Arch>) {
      mamba_native::cpu::store<Arch>(to + i, Vec<Arch>::load_unaligned(from + i));
    }
  }
  for (; i < count; ++i) {
    to[i * step] = from_float<T>(from[i]);
  }
}

template <class Arch>
void write_line(const float* from, const TensorView& tensor, std::int64_t offset, std::int64_t step,
                int count) {
  switch (tensor.dtype) {
    case DType::f32:
      write_elements<Arch>(from, tensor.as<float>() + offset, step, count);
      return;
    case DType::f16:
      write_elements<Arch>(from, tensor.as<Half>() + offset, step, count);
      return;
    default:
      write_elements<Arch>(from, tensor.as<BFloat16>() + offset, step, count);
      return;
  }
}

template <class Arch>
MAMBA_ALWAYS_INLINE void fill(float* line, int count, float value) {
  for (int i = 0; i < count; ++i) {
    line[i] = value;
  }
}

// d silu(p) / dp
template <class Arch>
MAMBA_ALWAYS_INLINE Vec<Arch> silu_grad(Vec<Arch> p) {
  const Vec<Arch> s = mamba_native::cpu::sigmoid<Arch>(p);
  return s * xsimd::fma(p, Vec<Arch>(1.0f) - s, Vec<Arch>(1.0f));
}

// To whole vectors.
template <class Arch>
constexpr int round_up(int count) {
  return (count + kLanes<Arch> - 1) / kLanes<Arch> * kLanes<Arch>;
}

// -------------------------------------------------------------------------------- along time

// Columns first, first + 1, ... of [initial_states, x], whatever lies outside being 0.
template <class Arch>
void read_columns(const Inputs& in, std::int64_t b, std::int64_t d, std::int64_t first, int count,
                  float* to) {
  int done = 0;
  for (; done < count && first + done < 0; ++done) {
    const std::int64_t state = first + done + in.weight.size[1] - 1;
    to[done] = 0.0f;
    if (in.initial_states.present() && state >= 0) {
      const TensorView& states = in.initial_states;
      read_line<Arch>(states,
                      b * states.stride[0] + d * states.stride[1] + state * states.stride[2], 1, 1,
                      to + done);
    }
  }
  const std::int64_t left = in.x.size[2] - (first + done);
  const int inside = left < count - done ? static_cast<int>(left < 0 ? 0 : left) : count - done;
  read_line<Arch>(in.x, b * in.x.stride[0] + d * in.x.stride[1] + (first + done) * in.x.stride[2],
                  in.x.stride[2], inside, to + done);
  fill<Arch>(to + done + inside, count - done - inside, 0.0f);
}

// seq_idx of a line's columns, as outputs and as taps; columns before x are of position 0's
// sequence. Padding and what lies behind x are -1 as outputs and -2 as taps, so that no output sees
// them and they see nothing.
template <class Arch>
struct SeqLine {
  std::int32_t output[kTimeLine];
  std::int32_t tap[kTimeLine];

  void read(const TensorView& seq_idx, std::int64_t b, std::int64_t first, int at, int count) {
    for (int i = 0; i < count; ++i) {
      const std::int64_t t = first + i;
      const std::int32_t value =
          t >= seq_idx.size[1]
              ? -1
              : seq_idx.as<const std::int32_t>()[b * seq_idx.stride[0] +
                                                 (t < 0 ? 0 : t) * seq_idx.stride[1]];
      output[at + i] = value < 0 ? -1 : value;
      tap[at + i] = value < 0 ? -2 : value;
    }
  }
};

template <class Arch>
using Mask = typename Vec<Arch>::batch_bool_type;
template <class Arch>
using Ints = xsimd::batch<std::int32_t, Arch>;

// `value` where the outputs of the vector at `output` see the taps at `tap`, 0 elsewhere.
template <class Arch>
MAMBA_ALWAYS_INLINE Vec<Arch> where_seen(const SeqLine<Arch>& seq, int output, int tap,
                                         Vec<Arch> value) {
  const Mask<Arch> seen = xsimd::batch_bool_cast<float>(
      Ints<Arch>::load_unaligned(seq.output + output) == Ints<Arch>::load_unaligned(seq.tap + tap));
  return xsimd::select(seen, value, Vec<Arch>(0.0f));
}

// p at the vector of columns x[at], ...
template <class Arch, int WIDTH, bool MASKED>
MAMBA_ALWAYS_INLINE Vec<Arch> pre_activation(const float* x, const SeqLine<Arch>& seq, int at,
                                             const Vec<Arch> (&weight)[WIDTH], Vec<Arch> bias,
                                             int first) {
  Vec<Arch> p = bias;
  for (int w = first; w < WIDTH; ++w) {
    const int shift = WIDTH - 1 - w;
    Vec<Arch> tap = Vec<Arch>::load_unaligned(x + at - shift);
    if constexpr (MASKED) {
      tap = where_seen<Arch>(seq, at, at - shift, tap);
    }
    p = xsimd::fma(weight[w], tap, p);
  }
  return p;
}

template <class Arch, int WIDTH>
MAMBA_ALWAYS_INLINE Vec<Arch> read_weights(const Inputs& in, std::int64_t d,
                                           Vec<Arch> (&weight)[WIDTH]) {
  float value = 0.0f;
  const int first = first_tap<Arch, WIDTH>(in);
  for (int w = first; w < WIDTH; ++w) {
    read_line<Arch>(in.weight, d * in.weight.stride[0] + (w - first) * in.weight.stride[1], 1, 1,
                    &value);
    weight[w] = Vec<Arch>(value);
  }
  value = 0.0f;
  if (in.bias.present()) {
    read_line<Arch>(in.bias, d * in.bias.stride[0], 1, 1, &value);
  }
  return Vec<Arch>(value);
}

// One row (b, d).
template <class Arch, int WIDTH, bool MASKED>
void forward_row(const ForwardParams& params, std::int64_t b, std::int64_t d) {
  constexpr int kHalo = WIDTH - 1;
  const Inputs& in = params.in;
  const std::int64_t length = in.x.size[2];
  float x[kTimeLine];
  float out[kTimeLine];
  SeqLine<Arch> seq;
  Vec<Arch> weight[WIDTH];
  const Vec<Arch> bias = read_weights<Arch, WIDTH>(in, d, weight);
  const int first = first_tap<Arch, WIDTH>(in);
  for (std::int64_t t = 0; t < length; t += kTimeBlock) {
    const int count = length - t < kTimeBlock ? static_cast<int>(length - t) : kTimeBlock;
    const int rounded = round_up<Arch>(count);
    read_columns<Arch>(in, b, d, t - kHalo, kHalo + rounded, x + kPad - kHalo);
    if constexpr (MASKED) {
      seq.read(in.seq_idx, b, t - kHalo, kPad - kHalo, kHalo + rounded);
    }
    for (int i = 0; i < rounded; i += kLanes<Arch>) {
      Vec<Arch> p = pre_activation<Arch, WIDTH, MASKED>(x, seq, kPad + i, weight, bias, first);
      if (in.silu) {
        p = mamba_native::cpu::silu<Arch>(p);
      }
      if constexpr (MASKED) {
        p = where_seen<Arch>(seq, kPad + i, kPad + i, p);
      }
      p.store_unaligned(out + i);
    }
    write_line<Arch>(out, params.out,
                     b * params.out.stride[0] + d * params.out.stride[1] + t * params.out.stride[2],
                     params.out.stride[2], count);
  }
}

// One channel, all sequences.
template <class Arch, int WIDTH, bool MASKED>
void backward_row(const BackwardParams& params, std::int64_t d) {
  constexpr int kHalo = WIDTH - 1;
  const Inputs& in = params.in;
  const std::int64_t length = in.x.size[2];
  const int first = first_tap<Arch, WIDTH>(in);
  const int states = kHalo - first;
  const TensorView& dfinal = params.dfinal_states;
  const TensorView& dinitial = params.dinitial_states;
  float x[kTimeLine];
  float dp[kTimeLine];  // dout first, then dp
  float dx[kTimeLine];
  SeqLine<Arch> seq;
  Vec<Arch> weight[WIDTH];
  const Vec<Arch> bias = read_weights<Arch, WIDTH>(in, d, weight);
  double dweight[WIDTH] = {};
  double dbias = 0;
  for (std::int64_t b = 0; b < in.x.size[0]; ++b) {
    for (std::int64_t t = 0; t < length; t += kTimeBlock) {
      const int count = length - t < kTimeBlock ? static_cast<int>(length - t) : kTimeBlock;
      // dx of the block needs dp of the W-1 steps behind it too. Whole vectors: what lies beyond
      // the sequence is 0 in x and in dout, and so in dp.
      const int rounded = round_up<Arch>(count);
      const int with_halo = round_up<Arch>(rounded + kHalo);
      read_columns<Arch>(in, b, d, t - kHalo, kHalo + with_halo, x + kPad - kHalo);
      const std::int64_t left = length - t;
      const int known = left < with_halo ? static_cast<int>(left) : with_halo;
      read_line<Arch>(
          params.dout,
          b * params.dout.stride[0] + d * params.dout.stride[1] + t * params.dout.stride[2],
          params.dout.stride[2], known, dp);
      fill<Arch>(dp + known, with_halo - known, 0.0f);
      if constexpr (MASKED) {
        seq.read(in.seq_idx, b, t - kHalo, kPad - kHalo, kHalo + with_halo);
      }
      for (int i = 0; i < with_halo; i += kLanes<Arch>) {
        Vec<Arch> grad = Vec<Arch>::load_unaligned(dp + i);
        if (in.silu) {
          grad *= silu_grad<Arch>(
              pre_activation<Arch, WIDTH, MASKED>(x, seq, kPad + i, weight, bias, first));
        }
        if constexpr (MASKED) {
          grad = where_seen<Arch>(seq, kPad + i, kPad + i, grad);
        }
        grad.store_unaligned(dp + i);
      }
      Vec<Arch> weight_sum[WIDTH];
      for (int w = 0; w < WIDTH; ++w) {
        weight_sum[w] = Vec<Arch>(0.0f);
      }
      Vec<Arch> bias_sum(0.0f);
      for (int i = 0; i < rounded; i += kLanes<Arch>) {
        const Vec<Arch> grad = Vec<Arch>::load_unaligned(dp + i);
        Vec<Arch> sum(0.0f);
        bias_sum += grad;
        for (int w = first; w < WIDTH; ++w) {
          const int shift = kHalo - w;
          Vec<Arch> tap = Vec<Arch>::load_unaligned(x + kPad + i - shift);
          Vec<Arch> later = Vec<Arch>::load_unaligned(dp + i + shift);
          if constexpr (MASKED) {
            tap = where_seen<Arch>(seq, kPad + i, kPad + i - shift, tap);
            later = where_seen<Arch>(seq, kPad + i + shift, kPad + i, later);
          }
          weight_sum[w] = xsimd::fma(grad, tap, weight_sum[w]);
          sum = xsimd::fma(weight[w], later, sum);
        }
        sum.store_unaligned(dx + i);
      }
      for (int w = 0; w < WIDTH; ++w) {
        dweight[w] += static_cast<double>(xsimd::reduce_add(weight_sum[w]));
      }
      dbias += static_cast<double>(xsimd::reduce_add(bias_sum));
      if (dfinal.present()) {
        const std::int64_t begin = length - states;  // the step of dfinal's column 0
        for (std::int64_t s = begin > t ? begin : t; s < t + count; ++s) {
          if (is_of_last_sequence(in, b, s)) {
            float extra;
            read_line<Arch>(
                dfinal,
                b * dfinal.stride[0] + d * dfinal.stride[1] + (s - begin) * dfinal.stride[2], 1, 1,
                &extra);
            dx[s - t] += extra;
          }
        }
      }
      write_line<Arch>(dx, params.dx,
                       b * params.dx.stride[0] + d * params.dx.stride[1] + t * params.dx.stride[2],
                       params.dx.stride[2], count);
      for (int j = 0; t == 0 && j < states && dinitial.present(); ++j) {
        float sum = 0.0f;
        for (int i = 0; i <= j; ++i) {  // the output that sees column j - states
          if (!MASKED || seq.output[kPad + i] == seq.tap[kPad + j - states]) {
            sum += weight[first + j - i].get(0) * dp[i];
          }
        }
        if (dfinal.present() && j >= length && is_of_last_sequence(in, b, j - states)) {
          float extra;
          read_line<Arch>(
              dfinal, b * dfinal.stride[0] + d * dfinal.stride[1] + (j - length) * dfinal.stride[2],
              1, 1, &extra);
          sum += extra;
        }
        write_line<Arch>(&sum, dinitial,
                         b * dinitial.stride[0] + d * dinitial.stride[1] + j * dinitial.stride[2],
                         1, 1);
      }
    }
  }
  for (int w = first; w < WIDTH; ++w) {
    params.dweight.as<float>()[d * (WIDTH - first) + w - first] = static_cast<float>(dweight[w]);
  }
  if (params.dbias.present()) {
    params.dbias.as<float>()[d] = static_cast<float>(dbias);
  }
}

// ---------------------------------------------------------------------------- along channels

// The least power of two that holds WIDTH lines.
template <int WIDTH>
inline constexpr int kRing = WIDTH <= 4 ? 4 : 8;

// Weights of a block of channels, transposed, and the last steps' lines of x.
template <class Arch, int WIDTH, int CHANNELS>
struct ChannelBlock {
  std::int64_t first;
  int count;
  int rounded;
  float weight[WIDTH][CHANNELS];
  float bias[CHANNELS];
  float ring[kRing<WIDTH>][CHANNELS];  // step t at t mod kRing
  float zeros[CHANNELS];
  const float* taps[WIDTH];
  int first_tap;

  float* line(std::int64_t t) { return ring[(t + kRing<WIDTH>) % kRing<WIDTH>]; }
};

template <class Arch, int WIDTH, int CHANNELS>
void open_block(const Inputs& in, std::int64_t index, ChannelBlock<Arch, WIDTH, CHANNELS>& block) {
  block.first = index * CHANNELS;
  const std::int64_t left = in.x.size[1] - block.first;
  block.count = left < CHANNELS ? static_cast<int>(left) : CHANNELS;
  block.rounded = round_up<Arch>(block.count);
  fill<Arch>(block.zeros, CHANNELS, 0.0f);
  fill<Arch>(block.bias, CHANNELS, 0.0f);
  for (int i = 0; i < kRing<WIDTH>; ++i) {
    fill<Arch>(block.ring[i], CHANNELS, 0.0f);
  }
  const int first = first_tap<Arch, WIDTH>(in);
  block.first_tap = first;
  for (int w = first; w < WIDTH; ++w) {
    fill<Arch>(block.weight[w], CHANNELS, 0.0f);
    read_line<Arch>(in.weight,
                    block.first * in.weight.stride[0] + (w - first) * in.weight.stride[1],
                    in.weight.stride[0], block.count, block.weight[w]);
  }
  if (in.bias.present()) {
    read_line<Arch>(in.bias, block.first * in.bias.stride[0], in.bias.stride[0], block.count,
                    block.bias);
  }
}

// Column t of [initial_states, x] into the ring.
template <class Arch, int WIDTH, int CHANNELS>
MAMBA_ALWAYS_INLINE void read_step(const Inputs& in, std::int64_t b, std::int64_t t,
                                   ChannelBlock<Arch, WIDTH, CHANNELS>& block) {
  const TensorView& from = t < 0 ? in.initial_states : in.x;
  const std::int64_t column = t < 0 ? t + in.weight.size[1] - 1 : t;
  if (!from.present() || column < 0) {
    fill<Arch>(block.line(t), CHANNELS, 0.0f);
    return;
  }
  read_line<Arch>(from, b * from.stride[0] + block.first * from.stride[1] + column * from.stride[2],
                  from.stride[1], block.count, block.line(t));
}

// Points taps at the lines that the output at t sees. False where t is padding.
template <class Arch, int WIDTH, int CHANNELS>
MAMBA_ALWAYS_INLINE bool find_taps(const Inputs& in, std::int64_t b, std::int64_t t,
                                   ChannelBlock<Arch, WIDTH, CHANNELS>& block) {
  const TensorView& seq_idx = in.seq_idx;
  for (int w = 0; w < WIDTH; ++w) {
    block.taps[w] = block.line(t - (WIDTH - 1 - w));
  }
  if (!seq_idx.present()) {
    return true;
  }
  const std::int32_t* row = seq_idx.as<const std::int32_t>() + b * seq_idx.stride[0];
  const std::int32_t own = row[t * seq_idx.stride[1]];
  for (int w = 0; w < WIDTH - 1; ++w) {
    const std::int64_t tap = t - (WIDTH - 1 - w);
    if (row[(tap < 0 ? 0 : tap) * seq_idx.stride[1]] != own) {
      block.taps[w] = block.zeros;
    }
  }
  return own >= 0;
}

template <class Arch, int WIDTH, int CHANNELS>
MAMBA_ALWAYS_INLINE Vec<Arch> pre_activation(const ChannelBlock<Arch, WIDTH, CHANNELS>& block,
                                             int i) {
  Vec<Arch> p = Vec<Arch>::load_unaligned(block.bias + i);
  for (int w = WIDTH < kMaxWidth ? 0 : block.first_tap; w < WIDTH; ++w) {
    p = xsimd::fma(Vec<Arch>::load_unaligned(block.weight[w] + i),
                   Vec<Arch>::load_unaligned(block.taps[w] + i), p);
  }
  return p;
}

// Steps [begin, end) of one block of channels of one sequence.
template <class Arch, int WIDTH>
void forward_block(const ForwardParams& params, std::int64_t b, std::int64_t index,
                   std::int64_t begin, std::int64_t end) {
  const Inputs& in = params.in;
  ChannelBlock<Arch, WIDTH, kForwardChannels> block;
  open_block<Arch>(in, index, block);
  for (std::int64_t t = begin - (WIDTH - 1); t < begin; ++t) {
    read_step<Arch>(in, b, t, block);
  }
  float out[kForwardChannels];
  for (std::int64_t t = begin; t < end; ++t) {
    read_step<Arch>(in, b, t, block);
    if (!find_taps(in, b, t, block)) {
      fill<Arch>(out, block.rounded, 0.0f);
    } else if (in.silu) {
      for (int i = 0; i < block.rounded; i += kLanes<Arch>) {
        mamba_native::cpu::silu<Arch>(pre_activation<Arch>(block, i)).store_unaligned(out + i);
      }
    } else {
      for (int i = 0; i < block.rounded; i += kLanes<Arch>) {
        pre_activation<Arch>(block, i).store_unaligned(out + i);
      }
    }
    write_line<Arch>(
        out, params.out,
        b * params.out.stride[0] + block.first * params.out.stride[1] + t * params.out.stride[2],
        params.out.stride[1], block.count);
  }
}

// Sums of a block of channels: in float for a while, then added up in double.
template <class Arch, int WIDTH>
struct ChannelSums {
  float dweight[WIDTH][kBackwardChannels];
  float dbias[kBackwardChannels];
  double total_dweight[WIDTH][kBackwardChannels];
  double total_dbias[kBackwardChannels];

  void flush() {
    for (int w = 0; w < WIDTH; ++w) {
      for (int i = 0; i < kBackwardChannels; ++i) {
        total_dweight[w][i] += static_cast<double>(dweight[w][i]);
        dweight[w][i] = 0.0f;
      }
    }
    for (int i = 0; i < kBackwardChannels; ++i) {
      total_dbias[i] += static_cast<double>(dbias[i]);
      dbias[i] = 0.0f;
    }
  }
};

// One block of channels, all sequences. Step t adds its dp to the dx of the W columns that its
// output saw; the oldest of them, t - (W-1), is then complete.
template <class Arch, int WIDTH>
void backward_block(const BackwardParams& params, std::int64_t index) {
  constexpr std::int64_t kFlush = 256;
  constexpr int kLines = kRing<WIDTH>;
  const Inputs& in = params.in;
  const int first = first_tap<Arch, WIDTH>(in);
  const int halo = WIDTH - 1 - first;
  const std::int64_t length = in.x.size[2];
  const TensorView& dfinal = params.dfinal_states;
  ChannelBlock<Arch, WIDTH, kBackwardChannels> block;
  open_block<Arch>(in, index, block);
  ChannelSums<Arch, WIDTH> sums = {};
  float dx_ring[kLines][kBackwardChannels];  // column t at t mod kLines
  float unseen[kBackwardChannels];           // takes what a masked tap would have got
  float dout[kBackwardChannels];
  fill<Arch>(unseen, kBackwardChannels, 0.0f);
  fill<Arch>(dout, kBackwardChannels, 0.0f);
  for (std::int64_t b = 0; b < in.x.size[0]; ++b) {
    for (std::int64_t t = -halo; t < 0; ++t) {
      read_step<Arch>(in, b, t, block);
      fill<Arch>(dx_ring[t + kLines], kBackwardChannels, 0.0f);
    }
    for (std::int64_t t = 0; t < length + halo; ++t) {
      fill<Arch>(dx_ring[t % kLines], kBackwardChannels, 0.0f);
      bool real = t < length;
      if (real) {
        read_step<Arch>(in, b, t, block);
        real = find_taps(in, b, t, block);
      }
      if (real) {
        read_line<Arch>(params.dout,
                        b * params.dout.stride[0] + block.first * params.dout.stride[1] +
                            t * params.dout.stride[2],
                        params.dout.stride[1], block.count, dout);
        float* dcolumn[WIDTH];
        for (int w = first; w < WIDTH; ++w) {
          dcolumn[w] = block.taps[w] == block.zeros
                           ? unseen
                           : dx_ring[(t - (WIDTH - 1 - w) + kLines) % kLines];
        }
        for (int i = 0; i < block.rounded; i += kLanes<Arch>) {
          Vec<Arch> grad = Vec<Arch>::load_unaligned(dout + i);
          if (in.silu) {
            grad *= silu_grad<Arch>(pre_activation<Arch>(block, i));
          }
          (Vec<Arch>::load_unaligned(sums.dbias + i) + grad).store_unaligned(sums.dbias + i);
          for (int w = first; w < WIDTH; ++w) {
            xsimd::fma(grad, Vec<Arch>::load_unaligned(block.taps[w] + i),
                       Vec<Arch>::load_unaligned(sums.dweight[w] + i))
                .store_unaligned(sums.dweight[w] + i);
            xsimd::fma(grad, Vec<Arch>::load_unaligned(block.weight[w] + i),
                       Vec<Arch>::load_unaligned(dcolumn[w] + i))
                .store_unaligned(dcolumn[w] + i);
          }
        }
      }
      const std::int64_t column = t - halo;
      float* done = dx_ring[(column + kLines) % kLines];
      if (dfinal.present() && t >= length && is_of_last_sequence(in, b, column)) {
        read_line<Arch>(
            dfinal,
            b * dfinal.stride[0] + block.first * dfinal.stride[1] + (t - length) * dfinal.stride[2],
            dfinal.stride[1], block.count, dout);
        for (int i = 0; i < block.count; ++i) {
          done[i] += dout[i];
        }
      }
      const TensorView& to = column < 0 ? params.dinitial_states : params.dx;
      if (to.present()) {
        write_line<Arch>(done, to,
                         b * to.stride[0] + block.first * to.stride[1] +
                             (column < 0 ? t : column) * to.stride[2],
                         to.stride[1], block.count);
      }
      if (t % kFlush == kFlush - 1) {
        sums.flush();
      }
    }
    sums.flush();
  }
  for (int i = 0; i < block.count; ++i) {
    for (int w = first; w < WIDTH; ++w) {
      params.dweight.as<float>()[(block.first + i) * (WIDTH - first) + w - first] =
          static_cast<float>(sums.total_dweight[w][i]);
    }
    if (params.dbias.present()) {
      params.dbias.as<float>()[block.first + i] = static_cast<float>(sums.total_dbias[i]);
    }
  }
}

// ------------------------------------------------------------------------------------- widths

template <class Arch, int WIDTH>
void forward_row_of_width(const ForwardParams& params, std::int64_t b, std::int64_t d) {
  if (params.in.seq_idx.present()) {
    forward_row<Arch, WIDTH, true>(params, b, d);
  } else {
    forward_row<Arch, WIDTH, false>(params, b, d);
  }
}

template <class Arch, int WIDTH>
void backward_row_of_width(const BackwardParams& params, std::int64_t d) {
  if (params.in.seq_idx.present()) {
    backward_row<Arch, WIDTH, true>(params, d);
  } else {
    backward_row<Arch, WIDTH, false>(params, d);
  }
}

}  // namespace kernel

template <class Arch, int WIDTH>
constexpr KernelsOfWidth kernels_of_width() {
  return {kernel::forward_row_of_width<Arch, WIDTH>, kernel::forward_block<Arch, WIDTH>,
          kernel::backward_row_of_width<Arch, WIDTH>, kernel::backward_block<Arch, WIDTH>};
}

template <class Arch>
constexpr Kernels kernels() {
  return {{kernels_of_width<Arch, 2>(), kernels_of_width<Arch, 3>(), kernels_of_width<Arch, 4>()},
          kernels_of_width<Arch, kMaxWidth>()};
}

}  // namespace mamba_native::causal_conv1d::cpu
