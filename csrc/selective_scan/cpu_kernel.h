// The scan in SIMD, written once and compiled per instruction set.
//
//   h[t] = exp(delta[t] A) h[t-1] + delta[t] u[t] B[t]        y[t] = sum_n C[t] h[t]
//
// Mapping: a vector holds one state of `lanes` channels, so the sum over states stays within a lane
// and B[n,t], C[n,t], which those channels share, are broadcast from memory. A block of channels
// runs through a tile of time for a few states at once, which live in registers; y accumulates in
// the tile. Tiles are float32 [step][lane] in L1 or L2; loading one transposes and converts, and
// pads missing channels and steps with zeros, for which the recurrence is inert (delta = 0: decay
// 1, input 0).
//
// exp(delta A) is 2^(delta A'), A' = A log2(e).
#pragma once

#include <cstdint>

#include "core/cpu/simd.h"
#include "core/cpu/transpose.h"
#include "core/math.h"
#include "selective_scan/cpu.h"
#include "selective_scan/sequences.h"

namespace mamba_native::selective_scan::cpu {

using mamba_native::cpu::kLanes;
using mamba_native::cpu::Vec;

// Steps of a tile. Forward's are short, so that B and C of 16 states and the block's tiles stay in
// L1. Backward's end at the checkpoints that it starts from.
inline constexpr int kForwardSteps = 128;
inline constexpr int kBackwardSteps = static_cast<int>(kCheckpointInterval);
static_assert(kBackwardSteps % kForwardSteps == 0, "a checkpoint is the state between two tiles");

// States that advance together: enough to hide the latency of the chain over time.
inline constexpr int kForwardStates = 4;
inline constexpr int kBackwardStates = 2;

// Cuts aligned arrays out of the scratch that the caller gave. A line of padding after each keeps
// arrays of the same power-of-two size out of each other's cache sets.
template <class Arch>
class Arena {
 public:
  static constexpr std::int64_t kLine = 16;

  MAMBA_ALWAYS_INLINE explicit Arena(float* memory) : next_(memory) {}

  static MAMBA_ALWAYS_INLINE std::int64_t size_of(std::int64_t count) {
    return (count + kLine - 1) / kLine * kLine + kLine;
  }
  MAMBA_ALWAYS_INLINE float* take(std::int64_t count) {
    float* const first = next_;
    next_ += size_of(count);
    return first;
  }

 private:
  float* next_;
};

// ---- moving data between tensors and float tiles ----

// to[step][lane] = from[lane * channel + step * time] for `steps` steps of `channels` channels;
// zero for the other lanes, and for further steps up to a multiple of kLanes.
template <class Arch, class T>
void load_tile(const T* from, std::int64_t channel, std::int64_t time, int channels, int steps,
               float* to) {
  constexpr int kWidth = kLanes<Arch>;
  using Square = mamba_native::cpu::Square<Arch>;
  constexpr int kSide = kLanes<Square>;
  int t = 0;
  if (time == 1 || time == -1) {
    for (; t + kSide <= steps; t += kSide) {
      const int lowest = time == 1 ? t : -t - (kSide - 1);  // where the square lies in memory
      for (int first = 0; first < kWidth; first += kSide) {
        Vec<Square> rows[kSide];
        for (int i = 0; i < kSide; ++i) {
          rows[i] = first + i < channels
                        ? mamba_native::cpu::load<Square>(from + (first + i) * channel + lowest)
                        : Vec<Square>(0.0f);
        }
        xsimd::transpose(rows, rows + kSide);
        for (int i = 0; i < kSide; ++i) {
          rows[i].store_unaligned(to + (t + (time == 1 ? i : kSide - 1 - i)) * kWidth + first);
        }
      }
    }
  } else if (channel == 1 && channels == kWidth) {
    for (; t < steps; ++t) {
      mamba_native::cpu::load<Arch>(from + t * time).store_unaligned(to + t * kWidth);
    }
  }
  for (; t < steps; ++t) {
    for (int c = 0; c < kWidth; ++c) {
      to[t * kWidth + c] = c < channels ? to_float(from[c * channel + t * time]) : 0.0f;
    }
  }
  for (; t % kWidth != 0; ++t) {
    Vec<Arch>(0.0f).store_unaligned(to + t * kWidth);
  }
}

template <class Arch, class T>
void store_tile(T* to, std::int64_t channel, std::int64_t time, int channels, int steps,
                const float* from) {
  constexpr int kWidth = kLanes<Arch>;
  using Square = mamba_native::cpu::Square<Arch>;
  constexpr int kSide = kLanes<Square>;
  int t = 0;
  if (time == 1 || time == -1) {
    for (; t + kSide <= steps; t += kSide) {
      const int lowest = time == 1 ? t : -t - (kSide - 1);
      for (int first = 0; first < channels; first += kSide) {
        Vec<Square> rows[kSide];
        for (int i = 0; i < kSide; ++i) {
          const int step = t + (time == 1 ? i : kSide - 1 - i);
          rows[i] = Vec<Square>::load_unaligned(from + step * kWidth + first);
        }
        xsimd::transpose(rows, rows + kSide);
        for (int i = 0; i < kSide; ++i) {
          if (first + i < channels) {
            mamba_native::cpu::store<Square>(to + (first + i) * channel + lowest, rows[i]);
          }
        }
      }
    }
  } else if (channel == 1 && channels == kWidth) {
    for (; t < steps; ++t) {
      mamba_native::cpu::store<Arch>(to + t * time, Vec<Arch>::load_unaligned(from + t * kWidth));
    }
  }
  for (; t < steps; ++t) {
    for (int c = 0; c < channels; ++c) {
      mamba_native::cpu::assign<Arch>(to + c * channel + t * time, from[t * kWidth + c]);
    }
  }
}

struct LastFirst {
  static constexpr std::uint32_t get(std::uint32_t lane, std::uint32_t lanes) {
    return lanes - 1 - lane;
  }
};

template <class Arch>
MAMBA_ALWAYS_INLINE Vec<Arch> reversed(Vec<Arch> value) {
  return xsimd::swizzle(value, xsimd::make_batch_constant<std::uint32_t, LastFirst, Arch>());
}

// to[row][step], STEPS to a row = first[offset of the row + step * time]; zero for further steps up
// to a multiple of kLanes.
template <class Arch, int STEPS, class T>
void load_rows(const T* first, const StateRows& rows, std::int64_t time, std::int64_t states,
               int steps, float* to) {
  constexpr int kWidth = kLanes<Arch>;
  for (std::int64_t n = 0; n < states; ++n, to += STEPS) {
    const T* const from = first + rows.offset(n);
    int t = 0;
    if (time == 1) {
      for (; t + kWidth <= steps; t += kWidth) {
        mamba_native::cpu::load<Arch>(from + t).store_unaligned(to + t);
      }
    } else if (time == -1) {
      for (; t + kWidth <= steps; t += kWidth) {
        reversed<Arch>(mamba_native::cpu::load<Arch>(from - t - (kWidth - 1)))
            .store_unaligned(to + t);
      }
    }
    for (; t < steps; ++t) {
      to[t] = to_float(from[t * time]);
    }
    for (; t % kWidth != 0; ++t) {
      to[t] = 0.0f;
    }
  }
}

// The same for views of (B, D, L), starting at a batch entry, channel and step, and for B or C of
// (B, G, N, L), starting at a batch entry, group and step.
struct Place {
  std::int64_t batch;
  std::int64_t row;
  std::int64_t time;
};

template <class Arch, class T>
MAMBA_ALWAYS_INLINE T* at(const TensorView& view, const Place& place) {
  return static_cast<T*>(view.data) + place.batch * view.stride[0] + place.row * view.stride[1] +
         place.time * view.stride[view.dim < 4 ? 2 : 3];
}

template <class Arch>
void load_tile(const TensorView& view, const Place& place, int channels, int steps, float* to) {
  const std::int64_t channel = view.stride[1];
  const std::int64_t time = view.stride[2];
  if (view.dtype == DType::f32) {
    load_tile<Arch>(at<Arch, const float>(view, place), channel, time, channels, steps, to);
  } else if (view.dtype == DType::f16) {
    load_tile<Arch>(at<Arch, const Half>(view, place), channel, time, channels, steps, to);
  } else {
    load_tile<Arch>(at<Arch, const BFloat16>(view, place), channel, time, channels, steps, to);
  }
}

template <class Arch>
void store_tile(const TensorView& view, const Place& place, int channels, int steps,
                const float* from) {
  const std::int64_t channel = view.stride[1];
  const std::int64_t time = view.stride[2];
  if (view.dtype == DType::f32) {
    store_tile<Arch>(at<Arch, float>(view, place), channel, time, channels, steps, from);
  } else if (view.dtype == DType::f16) {
    store_tile<Arch>(at<Arch, Half>(view, place), channel, time, channels, steps, from);
  } else {
    store_tile<Arch>(at<Arch, BFloat16>(view, place), channel, time, channels, steps, from);
  }
}

template <class Arch, int STEPS>
void load_rows(const Inputs& in, const TensorView& view, const Place& place, int steps, float* to) {
  const StateRows rows = rows_of(in, view, 2);
  const std::int64_t time = view.stride[3];
  const std::int64_t states = count_rows(in);
  if (view.dtype == DType::f32) {
    load_rows<Arch, STEPS>(at<Arch, const float>(view, place), rows, time, states, steps, to);
  } else if (view.dtype == DType::f16) {
    load_rows<Arch, STEPS>(at<Arch, const Half>(view, place), rows, time, states, steps, to);
  } else {
    load_rows<Arch, STEPS>(at<Arch, const BFloat16>(view, place), rows, time, states, steps, to);
  }
}

// [row][lane] = from[lane * channel + offset of the row], zero for missing channels, and back.
template <class Arch>
void gather(const float* from, std::int64_t channel, const StateRows& rows, int channels,
            std::int64_t states, float* to) {
  for (std::int64_t n = 0; n < states; ++n) {
    for (int c = 0; c < kLanes<Arch>; ++c) {
      to[n * kLanes<Arch> + c] = c < channels ? from[c * channel + rows.offset(n)] : 0.0f;
    }
  }
}

template <class Arch>
void scatter(float* to, std::int64_t channel, const StateRows& rows, int channels,
             std::int64_t states, const float* from) {
  for (std::int64_t n = 0; n < states; ++n) {
    for (int c = 0; c < channels; ++c) {
      to[c * channel + rows.offset(n)] = from[n * kLanes<Arch> + c];
    }
  }
}

// States of a block of channels, a row of a (B or S, D, N) view: zero where the view or the row is
// absent, and no store there.
template <class Arch>
void load_states(const Inputs& in, const TensorView& view, std::int64_t row, std::int64_t first,
                 int channels, std::int64_t states, float* to) {
  if (view.dim >= 0 && row >= 0) {
    gather<Arch>(at<Arch, const float>(view, {row, first, 0}), view.stride[1], rows_of(in, view, 2),
                 channels, states, to);
  } else {
    gather<Arch>(nullptr, 0, StateRows(), 0, states, to);
  }
}

template <class Arch>
void store_states(const Inputs& in, const TensorView& view, std::int64_t row, std::int64_t first,
                  int channels, std::int64_t states, const float* from) {
  if (view.dim >= 0 && row >= 0) {
    scatter<Arch>(at<Arch, float>(view, {row, first, 0}), view.stride[1], rows_of(in, view, 2),
                  channels, states, from);
  }
}

// One value per channel, from a view of (D); zero where absent.
template <class Arch>
Vec<Arch> gather_lanes(const TensorView& view, std::int64_t first, int channels) {
  alignas(64) float lanes[kLanes<Arch>];
  for (int c = 0; c < kLanes<Arch>; ++c) {
    lanes[c] = view.dim >= 0 && c < channels
                   ? static_cast<const float*>(view.data)[(first + c) * view.stride[0]]
                   : 0.0f;
  }
  return Vec<Arch>::load_unaligned(lanes);
}

// B or C of some states: a row of steps each, shared by the channels (VARYING), or a vector each
// that holds for all time.
template <class Arch, int STEPS, bool VARYING>
MAMBA_ALWAYS_INLINE Vec<Arch> projection(const float* from, int state, int step) {
  if constexpr (VARYING) {
    return Vec<Arch>(from[state * STEPS + step]);
  } else {
    return Vec<Arch>::load_unaligned(from + state * kLanes<Arch>);
  }
}

// Floats between the projections of two successive states.
template <class Arch, int STEPS>
MAMBA_ALWAYS_INLINE std::int64_t projection_stride(const TensorView& view) {
  return view.dim >= 4 ? STEPS : kLanes<Arch>;
}

// ---- forward ----

// STATES states of one block through one tile: y += C h, h is updated.
template <class Arch, int STATES, bool VARYING_B, bool VARYING_C>
void forward_states(int steps, const float* a, const float* b, const float* c, const float* delta,
                    const float* x, float* y, float* h) {
  using V = Vec<Arch>;
  constexpr int kWidth = kLanes<Arch>;
  V rate[STATES];
  V state[STATES];
  for (int k = 0; k < STATES; ++k) {
    rate[k] = V::load_unaligned(a + k * kWidth);
    state[k] = V::load_unaligned(h + k * kWidth);
  }
  for (int t = 0; t < steps; ++t) {
    const V step_delta = V::load_unaligned(delta + t * kWidth);
    const V step_x = V::load_unaligned(x + t * kWidth);
    V step_y = V::load_unaligned(y + t * kWidth);
    for (int k = 0; k < STATES; ++k) {
      const V decay = mamba_native::cpu::exp2_decay<Arch>(step_delta * rate[k]);
      const V input = projection<Arch, kForwardSteps, VARYING_B>(b, k, t) * step_x;
      state[k] = xsimd::fma(state[k], decay, input);
      step_y = xsimd::fma(state[k], projection<Arch, kForwardSteps, VARYING_C>(c, k, t), step_y);
    }
    step_y.store_unaligned(y + t * kWidth);
  }
  for (int k = 0; k < STATES; ++k) {
    state[k].store_unaligned(h + k * kWidth);
  }
}

// exp(delta A) of complex states.
template <class Arch>
struct Turn {
  Vec<Arch> re;
  Vec<Arch> im;

  MAMBA_ALWAYS_INLINE Turn(Vec<Arch> exponent, Vec<Arch> angle) {
    const Vec<Arch> size = mamba_native::cpu::exp2_decay<Arch>(exponent);
    const auto [sine, cosine] = xsimd::sincos(angle);
    re = size * cosine;
    im = size * sine;
  }
};

// The same with complex states, two rows each: y += 2 Re(C h).
template <class Arch, int STATES, bool VARYING_B, bool VARYING_C>
void forward_complex(int steps, const float* a, const float* b, const float* c, const float* delta,
                     const float* x, float* y, float* h) {
  using V = Vec<Arch>;
  constexpr int kWidth = kLanes<Arch>;
  V rate[2 * STATES];
  V state[2 * STATES];
  for (int k = 0; k < 2 * STATES; ++k) {
    rate[k] = V::load_unaligned(a + k * kWidth);
    state[k] = V::load_unaligned(h + k * kWidth);
  }
  for (int t = 0; t < steps; ++t) {
    const V step_delta = V::load_unaligned(delta + t * kWidth);
    const V step_x = V::load_unaligned(x + t * kWidth);
    V sum = V(0.0f);
    for (int k = 0; k < 2 * STATES; k += 2) {
      const Turn<Arch> decay(step_delta * rate[k], step_delta * rate[k + 1]);
      const V re = xsimd::fma(decay.re, state[k],
                              projection<Arch, kForwardSteps, VARYING_B>(b, k, t) * step_x);
      const V im = xsimd::fma(decay.re, state[k + 1],
                              projection<Arch, kForwardSteps, VARYING_B>(b, k + 1, t) * step_x);
      const V last = state[k];
      state[k] = xsimd::fnma(decay.im, state[k + 1], re);
      state[k + 1] = xsimd::fma(decay.im, last, im);
      sum = xsimd::fma(state[k], projection<Arch, kForwardSteps, VARYING_C>(c, k, t), sum);
      sum = xsimd::fnma(state[k + 1], projection<Arch, kForwardSteps, VARYING_C>(c, k + 1, t), sum);
    }
    xsimd::fma(V(2.0f), sum, V::load_unaligned(y + t * kWidth)).store_unaligned(y + t * kWidth);
  }
  for (int k = 0; k < 2 * STATES; ++k) {
    state[k].store_unaligned(h + k * kWidth);
  }
}

using ForwardStates = void (*)(int steps, const float* a, const float* b, const float* c,
                               const float* delta, const float* x, float* y, float* h);

// ROWS of states at once.
template <class Arch, int ROWS>
ForwardStates forward_complex_for(bool varying_B, bool varying_C) {
  if (varying_B) {
    return varying_C ? &forward_complex<Arch, ROWS / 2, true, true>
                     : &forward_complex<Arch, ROWS / 2, true, false>;
  }
  return varying_C ? &forward_complex<Arch, ROWS / 2, false, true>
                   : &forward_complex<Arch, ROWS / 2, false, false>;
}

template <class Arch, int STATES>
ForwardStates forward_states_for(bool varying_B, bool varying_C) {
  if (varying_B) {
    return varying_C ? &forward_states<Arch, STATES, true, true>
                     : &forward_states<Arch, STATES, true, false>;
  }
  return varying_C ? &forward_states<Arch, STATES, false, true>
                   : &forward_states<Arch, STATES, false, false>;
}

// What a block of channels keeps through time: [state][lane] each.
template <class Arch>
struct BlockConstants {
  static constexpr int kArrays = 3;

  BlockConstants(float* memory, std::int64_t states)
      : a(memory), b(a + states * kLanes<Arch>), c(b + states * kLanes<Arch>) {}

  void load(const Inputs& in, std::int64_t first, int channels, std::int64_t states) const {
    load(in, in.A, first, channels, states, a);
    // A complex rate has a second part, the angle that a state turns by.
    const std::int64_t parts = in.A.dim == 3 ? 2 : 1;
    for (std::int64_t n = 0; n < states; n += parts) {
      for (int i = 0; i < kLanes<Arch>; ++i) {
        a[n * kLanes<Arch> + i] *= kLog2E;
      }
    }
    if (in.B.dim < 4) {
      load(in, in.B, first, channels, states, b);
    }
    if (in.C.dim < 4) {
      load(in, in.C, first, channels, states, c);
    }
  }

  float* a;  // A', in rows of angles A
  float* b;  // B and C where they are static
  float* c;

 private:
  static void load(const Inputs& in, const TensorView& view, std::int64_t first, int channels,
                   std::int64_t states, float* to) {
    gather<Arch>(static_cast<const float*>(view.data) + first * view.stride[0], view.stride[0],
                 rows_of(in, view, 1), channels, states, to);
  }
};

template <class Arch>
std::int64_t forward_scratch(std::int64_t states, std::int64_t channels) {
  using A = Arena<Arch>;
  return 2 * A::size_of(states * kForwardSteps) + 3 * A::size_of(kForwardSteps * kLanes<Arch>) +
         A::size_of((BlockConstants<Arch>::kArrays + 1) * states * channels);
}

template <class Arch>
void forward_slice(const ForwardParams& params, const Slice& slice, float* scratch) {
  using V = Vec<Arch>;
  constexpr int kWidth = kLanes<Arch>;
  const Inputs& in = params.in;
  const std::int64_t states = count_rows(in);
  const std::int64_t length = in.u.size[2];
  const bool varying_B = in.B.dim >= 4;
  const bool varying_C = in.C.dim >= 4;
  const bool gated = in.z.dim >= 0;
  const bool is_complex = in.A.dim == 3;
  const int one = is_complex ? 2 : 1;  // rows of a state
  const ForwardStates run = is_complex
                                ? forward_complex_for<Arch, kForwardStates>(varying_B, varying_C)
                                : forward_states_for<Arch, kForwardStates>(varying_B, varying_C);
  const ForwardStates run_one = is_complex ? forward_complex_for<Arch, 2>(varying_B, varying_C)
                                           : forward_states_for<Arch, 1>(varying_B, varying_C);
  const Sequences sequences = sequences_of(in, slice.batch);

  Arena<Arch> arena(scratch);
  float* const rows_B = arena.take(states * kForwardSteps);
  float* const rows_C = arena.take(states * kForwardSteps);
  float* const delta = arena.take(kForwardSteps * kWidth);
  float* const x = arena.take(kForwardSteps * kWidth);
  float* const y = arena.take(kForwardSteps * kWidth);
  const std::int64_t block_floats = states * kWidth;
  constexpr int kBlockArrays = BlockConstants<Arch>::kArrays + 1;
  float* const blocks =
      arena.take(kBlockArrays * states * ((slice.count + kWidth - 1) / kWidth * kWidth));

  for (std::int64_t done = 0; done < slice.count; done += kWidth) {
    const std::int64_t first = slice.first + done;
    const int channels =
        static_cast<int>(slice.count - done < kWidth ? slice.count - done : kWidth);
    float* const block = blocks + done / kWidth * kBlockArrays * block_floats;
    BlockConstants<Arch>(block, states).load(in, first, channels, states);
  }

  for (std::int64_t start = 0; start < length; start += kForwardSteps) {
    const int steps =
        static_cast<int>(length - start < kForwardSteps ? length - start : kForwardSteps);
    if (varying_B) {
      load_rows<Arch, kForwardSteps>(in, in.B, {slice.batch, slice.group, start}, steps, rows_B);
    }
    if (varying_C) {
      load_rows<Arch, kForwardSteps>(in, in.C, {slice.batch, slice.group, start}, steps, rows_C);
    }
    for (std::int64_t done = 0; done < slice.count; done += kWidth) {
      const std::int64_t first = slice.first + done;
      const int channels =
          static_cast<int>(slice.count - done < kWidth ? slice.count - done : kWidth);
      const Place place = {slice.batch, first, start};
      float* const block = blocks + done / kWidth * kBlockArrays * block_floats;
      const BlockConstants<Arch> constants(block, states);
      float* const h = block + BlockConstants<Arch>::kArrays * block_floats;
      if (start == 0) {
        load_states<Arch>(in, in.initial_state, sequences.entering(0), first, channels, states, h);
      }
      if (start % kCheckpointInterval == 0) {
        const TensorView& to = params.checkpoints;
        scatter<Arch>(static_cast<float*>(to.data) + slice.batch * to.stride[0] +
                          first * to.stride[1] + start / kCheckpointInterval * states,
                      to.stride[1], StateRows(), channels, states, h);
      }

      load_tile<Arch>(in.delta, place, channels, steps, delta);
      load_tile<Arch>(in.u, place, channels, steps, x);
      const V bias = gather_lanes<Arch>(in.delta_bias, first, channels);
      const V skip = gather_lanes<Arch>(in.D, first, channels);
      for (int i = 0; i < steps * kWidth; i += kWidth) {
        V step_delta = V::load_unaligned(delta + i) + bias;
        if (in.delta_softplus) {
          step_delta = mamba_native::cpu::softplus<Arch>(step_delta);
        }
        const V u = V::load_unaligned(x + i);
        step_delta.store_unaligned(delta + i);
        (step_delta * u).store_unaligned(x + i);
        (skip * u).store_unaligned(y + i);
      }

      const std::int64_t stride_B = projection_stride<Arch, kForwardSteps>(in.B);
      const std::int64_t stride_C = projection_stride<Arch, kForwardSteps>(in.C);
      const float* const b = varying_B ? rows_B : constants.b;
      const float* const c = varying_C ? rows_C : constants.c;
      // The part of each sequence that lies in the tile.
      for (std::int64_t begin = start, end; begin < start + steps; begin = end) {
        end = sequences.end_of(begin, start + steps);
        if (begin > 0 && sequences.begins(begin)) {
          load_states<Arch>(in, in.initial_state, sequences.entering(begin), first, channels,
                            states, h);
        }
        const int from = static_cast<int>(begin - start);
        const int count = static_cast<int>(end - begin);
        for (std::int64_t n = 0; n < states;) {
          const bool several = n + kForwardStates <= states;
          (several ? run : run_one)(
              count, constants.a + n * kWidth, b + n * stride_B + (varying_B ? from : 0),
              c + n * stride_C + (varying_C ? from : 0), delta + from * kWidth, x + from * kWidth,
              y + from * kWidth, h + n * kWidth);
          n += several ? kForwardStates : one;
        }
        if (sequences.ends(end - 1)) {
          store_states<Arch>(in, params.last_state, sequences.leaving(end - 1), first, channels,
                             states, h);
        }
      }

      if (gated) {
        load_tile<Arch>(in.z, place, channels, steps, x);
        for (int i = 0; i < steps * kWidth; i += kWidth) {
          const V gate = mamba_native::cpu::silu<Arch>(V::load_unaligned(x + i));
          (V::load_unaligned(y + i) * gate).store_unaligned(y + i);
        }
      }
      store_tile<Arch>(params.out, place, channels, steps, y);
    }
  }
}

// ---- backward ----

// One tile of one block in backward: [step][lane], but for the last two.
template <class Arch>
struct BackwardTile {
  float* u;
  float* delta;
  float* x;        // delta u
  float* g;        // dL/dy
  float* y;        // D u + C h, summed over states
  float* sum_qB;   // q B, summed over states; in the end du
  float* sum_qAa;  // q A' exp(delta A) h[t-1], summed over states; in the end ddelta
  float* history;  // of the states in turn: h[t-1] and h[t], [state][step + 1][lane]
  float* decays;   // of the states in turn: exp(delta A), [state][step][lane]

  // From a step on. history and decays are scratch and stay.
  MAMBA_ALWAYS_INLINE BackwardTile from(std::int64_t step) const {
    const std::int64_t floats = step * kLanes<Arch>;
    return {u + floats,      delta + floats,   x + floats, g + floats, y + floats,
            sum_qB + floats, sum_qAa + floats, history,    decays};
  }
};

// to[i] += the sum over lanes of row i, for kLanes rows of [lane].
template <class Arch>
MAMBA_ALWAYS_INLINE void add_lane_sums(const float* rows, float* to) {
  using Square = mamba_native::cpu::Square<Arch>;
  constexpr int kSide = kLanes<Square>;
  for (int first = 0; first < kLanes<Arch>; first += kSide) {
    Vec<Square> parts[kSide];
    for (int i = 0; i < kSide; ++i) {
      const float* const row = rows + (first + i) * kLanes<Arch>;
      parts[i] = Vec<Square>::load_unaligned(row);
      for (int part = kSide; part < kLanes<Arch>; part += kSide) {
        parts[i] = parts[i] + Vec<Square>::load_unaligned(row + part);
      }
    }
    (Vec<Square>::load_unaligned(to + first) + xsimd::haddp(parts)).store_unaligned(to + first);
  }
}

// The same for the first `count` rows: what follows belongs to another sequence.
template <class Arch>
MAMBA_ALWAYS_INLINE void add_lane_sums(float* rows, int count, float* to) {
  if (count == kLanes<Arch>) {
    add_lane_sums<Arch>(rows, to);
    return;
  }
  for (int i = count * kLanes<Arch>; i < kLanes<Arch> * kLanes<Arch>; ++i) {
    rows[i] = 0.0f;
  }
  alignas(64) float sums[kLanes<Arch>] = {};
  add_lane_sums<Arch>(rows, sums);
  for (int i = 0; i < count; ++i) {
    to[i] += sums[i];
  }
}

// Recomputes the states of the tile from `h`, the state that enters it, then walks back through it:
//   q[t]  = C[t] g[t] + carry,  carry <- exp(delta[t] A) q[t]
//   dC[t] = g h[t],  dB[t] = x q[t],  summed over channels
// `quantities` are the block's, at the first of these states; dB and dC rows have `row` floats.
template <class Arch, int STATES, bool VARYING_B, bool VARYING_C>
void backward_states(int steps, const float* a, const float* b, const float* c, const float* h,
                     const BackwardTile<Arch>& tile, float* quantities,
                     std::int64_t quantity_floats, float* dB, float* dC, std::int64_t row) {
  using V = Vec<Arch>;
  constexpr int kWidth = kLanes<Arch>;
  constexpr int kHistory = (kBackwardSteps + 1) * kWidth + Arena<Arch>::kLine;
  constexpr int kDecays = kBackwardSteps * kWidth + Arena<Arch>::kLine;
  V rate[STATES];
  V state[STATES];
  for (int k = 0; k < STATES; ++k) {
    rate[k] = V::load_unaligned(a + k * kWidth);
    state[k] = V::load_unaligned(h + k * kWidth);
    state[k].store_unaligned(tile.history + k * kHistory);
  }
  for (int t = 0; t < steps; ++t) {
    const V delta = V::load_unaligned(tile.delta + t * kWidth);
    const V x = V::load_unaligned(tile.x + t * kWidth);
    V y = V::load_unaligned(tile.y + t * kWidth);
    for (int k = 0; k < STATES; ++k) {
      const V decay = mamba_native::cpu::exp2_decay<Arch>(delta * rate[k]);
      state[k] =
          xsimd::fma(state[k], decay, projection<Arch, kBackwardSteps, VARYING_B>(b, k, t) * x);
      y = xsimd::fma(state[k], projection<Arch, kBackwardSteps, VARYING_C>(c, k, t), y);
      decay.store_unaligned(tile.decays + k * kDecays + t * kWidth);
      state[k].store_unaligned(tile.history + k * kHistory + (t + 1) * kWidth);
    }
    y.store_unaligned(tile.y + t * kWidth);
  }

  V carry[STATES];
  V sum_A[STATES];
  V sum_B[STATES];
  V sum_C[STATES];
  for (int k = 0; k < STATES; ++k) {
    carry[k] = V::load_unaligned(quantities + kCarry * quantity_floats + k * kWidth);
    sum_A[k] = V(0.0f);
    sum_B[k] = V(0.0f);
    sum_C[k] = V(0.0f);
  }
  for (int start = (steps - 1) / kWidth * kWidth; start >= 0; start -= kWidth) {
    alignas(64) float rows_B[STATES][kWidth * kWidth];
    alignas(64) float rows_C[STATES][kWidth * kWidth];
    const int count = steps - start < kWidth ? steps - start : kWidth;
    for (int i = count - 1; i >= 0; --i) {
      const int t = start + i;
      const V delta = V::load_unaligned(tile.delta + t * kWidth);
      const V x = V::load_unaligned(tile.x + t * kWidth);
      const V g = V::load_unaligned(tile.g + t * kWidth);
      V sum_qB = V::load_unaligned(tile.sum_qB + t * kWidth);
      V sum_qAa = V::load_unaligned(tile.sum_qAa + t * kWidth);
      for (int k = 0; k < STATES; ++k) {
        const V q = xsimd::fma(projection<Arch, kBackwardSteps, VARYING_C>(c, k, t), g, carry[k]);
        const float* const now = tile.history + k * kHistory + (t + 1) * kWidth;
        if constexpr (VARYING_C) {
          (V::load_unaligned(now) * g).store_unaligned(rows_C[k] + i * kWidth);
        } else {
          sum_C[k] = xsimd::fma(V::load_unaligned(now), g, sum_C[k]);
        }
        if constexpr (VARYING_B) {
          (q * x).store_unaligned(rows_B[k] + i * kWidth);
        } else {
          sum_B[k] = xsimd::fma(q, x, sum_B[k]);
        }
        sum_qB = xsimd::fma(q, projection<Arch, kBackwardSteps, VARYING_B>(b, k, t), sum_qB);
        carry[k] = V::load_unaligned(tile.decays + k * kDecays + t * kWidth) * q;
        const V qa = carry[k] * V::load_unaligned(now - kWidth);
        sum_qAa = xsimd::fma(qa, rate[k], sum_qAa);
        sum_A[k] = xsimd::fma(qa, delta, sum_A[k]);
      }
      sum_qB.store_unaligned(tile.sum_qB + t * kWidth);
      sum_qAa.store_unaligned(tile.sum_qAa + t * kWidth);
    }
    for (int k = 0; k < STATES; ++k) {
      if constexpr (VARYING_B) {
        add_lane_sums<Arch>(rows_B[k], count, dB + k * row + start);
      }
      if constexpr (VARYING_C) {
        add_lane_sums<Arch>(rows_C[k], count, dC + k * row + start);
      }
    }
  }
  for (int k = 0; k < STATES; ++k) {
    float* const to = quantities + k * kWidth;
    carry[k].store_unaligned(to + kCarry * quantity_floats);
    (V::load_unaligned(to + kSumA * quantity_floats) + sum_A[k])
        .store_unaligned(to + kSumA * quantity_floats);
    (V::load_unaligned(to + kSumB * quantity_floats) + sum_B[k])
        .store_unaligned(to + kSumB * quantity_floats);
    (V::load_unaligned(to + kSumC * quantity_floats) + sum_C[k])
        .store_unaligned(to + kSumC * quantity_floats);
  }
}

// The same with one complex state, two rows: its adjoint is multiplied by conjugates, and C and h
// meet 2 g. sum_qAa takes the angle's part in the unit of the other one.
template <class Arch, bool VARYING_B, bool VARYING_C>
void backward_complex(int steps, const float* a, const float* b, const float* c, const float* h,
                      const BackwardTile<Arch>& tile, float* quantities,
                      std::int64_t quantity_floats, float* dB, float* dC, std::int64_t row) {
  using V = Vec<Arch>;
  constexpr int kWidth = kLanes<Arch>;
  constexpr int kHistory = (kBackwardSteps + 1) * kWidth + Arena<Arch>::kLine;
  constexpr int kDecays = kBackwardSteps * kWidth + Arena<Arch>::kLine;
  const V rate = V::load_unaligned(a);
  const V angle = V::load_unaligned(a + kWidth);
  float* const history_im = tile.history + kHistory;
  float* const decays_im = tile.decays + kDecays;
  V re = V::load_unaligned(h);
  V im = V::load_unaligned(h + kWidth);
  re.store_unaligned(tile.history);
  im.store_unaligned(history_im);
  for (int t = 0; t < steps; ++t) {
    const V delta = V::load_unaligned(tile.delta + t * kWidth);
    const V x = V::load_unaligned(tile.x + t * kWidth);
    const Turn<Arch> decay(delta * rate, delta * angle);
    const V input = projection<Arch, kBackwardSteps, VARYING_B>(b, 0, t) * x;
    const V input_im = projection<Arch, kBackwardSteps, VARYING_B>(b, 1, t) * x;
    const V last = re;
    re = xsimd::fnma(decay.im, im, xsimd::fma(decay.re, re, input));
    im = xsimd::fma(decay.im, last, xsimd::fma(decay.re, im, input_im));
    V sum = re * projection<Arch, kBackwardSteps, VARYING_C>(c, 0, t);
    sum = xsimd::fnma(im, projection<Arch, kBackwardSteps, VARYING_C>(c, 1, t), sum);
    xsimd::fma(V(2.0f), sum, V::load_unaligned(tile.y + t * kWidth))
        .store_unaligned(tile.y + t * kWidth);
    decay.re.store_unaligned(tile.decays + t * kWidth);
    decay.im.store_unaligned(decays_im + t * kWidth);
    re.store_unaligned(tile.history + (t + 1) * kWidth);
    im.store_unaligned(history_im + (t + 1) * kWidth);
  }

  V carry = V::load_unaligned(quantities + kCarry * quantity_floats);
  V carry_im = V::load_unaligned(quantities + kCarry * quantity_floats + kWidth);
  V sums[kQuantities][2];  // of kSumA, kSumB and kSumC
  for (int i = kSumA; i < kQuantities; ++i) {
    sums[i][0] = sums[i][1] = V(0.0f);
  }
  for (int start = (steps - 1) / kWidth * kWidth; start >= 0; start -= kWidth) {
    alignas(64) float rows_B[2][kWidth * kWidth];
    alignas(64) float rows_C[2][kWidth * kWidth];
    const int count = steps - start < kWidth ? steps - start : kWidth;
    for (int i = count - 1; i >= 0; --i) {
      const int t = start + i;
      const V delta = V::load_unaligned(tile.delta + t * kWidth);
      const V x = V::load_unaligned(tile.x + t * kWidth);
      const V g = V(2.0f) * V::load_unaligned(tile.g + t * kWidth);
      const V q = xsimd::fma(projection<Arch, kBackwardSteps, VARYING_C>(c, 0, t), g, carry);
      const V q_im = xsimd::fnma(projection<Arch, kBackwardSteps, VARYING_C>(c, 1, t), g, carry_im);
      const float* const now = tile.history + (t + 1) * kWidth;
      const float* const now_im = history_im + (t + 1) * kWidth;
      const V dC_re = g * V::load_unaligned(now);
      const V dC_im = -(g * V::load_unaligned(now_im));
      if constexpr (VARYING_C) {
        dC_re.store_unaligned(rows_C[0] + i * kWidth);
        dC_im.store_unaligned(rows_C[1] + i * kWidth);
      } else {
        sums[kSumC][0] = sums[kSumC][0] + dC_re;
        sums[kSumC][1] = sums[kSumC][1] + dC_im;
      }
      if constexpr (VARYING_B) {
        (q * x).store_unaligned(rows_B[0] + i * kWidth);
        (q_im * x).store_unaligned(rows_B[1] + i * kWidth);
      } else {
        sums[kSumB][0] = xsimd::fma(q, x, sums[kSumB][0]);
        sums[kSumB][1] = xsimd::fma(q_im, x, sums[kSumB][1]);
      }
      V sum_qB = V::load_unaligned(tile.sum_qB + t * kWidth);
      sum_qB = xsimd::fma(q, projection<Arch, kBackwardSteps, VARYING_B>(b, 0, t), sum_qB);
      sum_qB = xsimd::fma(q_im, projection<Arch, kBackwardSteps, VARYING_B>(b, 1, t), sum_qB);
      sum_qB.store_unaligned(tile.sum_qB + t * kWidth);
      const V decay = V::load_unaligned(tile.decays + t * kWidth);
      const V decay_im = V::load_unaligned(decays_im + t * kWidth);
      carry = xsimd::fma(decay, q, decay_im * q_im);
      carry_im = xsimd::fnma(decay_im, q, decay * q_im);
      const V before = V::load_unaligned(now - kWidth);
      const V before_im = V::load_unaligned(now_im - kWidth);
      const V qa = xsimd::fma(carry, before, carry_im * before_im);
      const V qa_im = xsimd::fnma(carry, before_im, carry_im * before);
      V sum_qAa = V::load_unaligned(tile.sum_qAa + t * kWidth);
      sum_qAa = xsimd::fma(qa, rate, xsimd::fma(qa_im, V(kLog2E) * angle, sum_qAa));
      sum_qAa.store_unaligned(tile.sum_qAa + t * kWidth);
      sums[kSumA][0] = xsimd::fma(qa, delta, sums[kSumA][0]);
      sums[kSumA][1] = xsimd::fma(qa_im, delta, sums[kSumA][1]);
    }
    for (int part = 0; part < 2; ++part) {
      if constexpr (VARYING_B) {
        add_lane_sums<Arch>(rows_B[part], count, dB + part * row + start);
      }
      if constexpr (VARYING_C) {
        add_lane_sums<Arch>(rows_C[part], count, dC + part * row + start);
      }
    }
  }
  carry.store_unaligned(quantities + kCarry * quantity_floats);
  carry_im.store_unaligned(quantities + kCarry * quantity_floats + kWidth);
  for (int i = kSumA; i < kQuantities; ++i) {
    for (int part = 0; part < 2; ++part) {
      float* const to = quantities + i * quantity_floats + part * kWidth;
      (V::load_unaligned(to) + sums[i][part]).store_unaligned(to);
    }
  }
}

// Fills a tile from the inputs, its sums with what does not depend on the state.
template <class Arch>
void load_backward_tile(const BackwardParams& params, const Place& place, int channels, int steps,
                        int padded, const BackwardTile<Arch>& tile) {
  using V = Vec<Arch>;
  constexpr int kWidth = kLanes<Arch>;
  const Inputs& in = params.in;
  const bool gated = in.z.dim >= 0;
  const V bias = gather_lanes<Arch>(in.delta_bias, place.row, channels);
  const V skip = gather_lanes<Arch>(in.D, place.row, channels);
  load_tile<Arch>(in.u, place, channels, steps, tile.u);
  load_tile<Arch>(in.delta, place, channels, steps, tile.delta);
  load_tile<Arch>(params.dout, place, channels, steps, tile.g);
  if (gated) {
    load_tile<Arch>(in.z, place, channels, steps, tile.y);
  }
  for (int i = 0; i < padded * kWidth; i += kWidth) {
    V delta = V::load_unaligned(tile.delta + i);
    if (i < steps * kWidth) {  // the padding's delta stays 0
      delta = delta + bias;
      if (in.delta_softplus) {
        delta = mamba_native::cpu::softplus<Arch>(delta);
      }
    }
    const V u = V::load_unaligned(tile.u + i);
    delta.store_unaligned(tile.delta + i);
    (delta * u).store_unaligned(tile.x + i);
    if (gated) {
      const V gate = mamba_native::cpu::silu<Arch>(V::load_unaligned(tile.y + i));
      (V::load_unaligned(tile.g + i) * gate).store_unaligned(tile.g + i);
    }
    (skip * u).store_unaligned(tile.y + i);
    V(0.0f).store_unaligned(tile.sum_qB + i);
    V(0.0f).store_unaligned(tile.sum_qAa + i);
  }
}

// From the sums over states to gradients. x and g are free for the inputs that are read once more:
// delta before softplus, then z and dout.
template <class Arch>
void store_backward_tile(const BackwardParams& params, const Place& place, int channels, int steps,
                         const BackwardTile<Arch>& tile, float* lane_sums) {
  using V = Vec<Arch>;
  constexpr int kWidth = kLanes<Arch>;
  const Inputs& in = params.in;
  const V bias = gather_lanes<Arch>(in.delta_bias, place.row, channels);
  const V skip = gather_lanes<Arch>(in.D, place.row, channels);
  if (in.delta_softplus) {
    load_tile<Arch>(in.delta, place, channels, steps, tile.x);
  }
  V sum_D = V::load_unaligned(lane_sums + kSumD * kWidth);
  V sum_bias = V::load_unaligned(lane_sums + kSumBias * kWidth);
  for (int i = 0; i < steps * kWidth; i += kWidth) {
    const V g = V::load_unaligned(tile.g + i);
    const V u = V::load_unaligned(tile.u + i);
    const V qB = V::load_unaligned(tile.sum_qB + i);
    V ddelta = xsimd::fma(V::load_unaligned(tile.sum_qAa + i), V(kLn2), u * qB);
    if (in.delta_softplus) {
      const V raw = V::load_unaligned(tile.x + i) + bias;
      ddelta = ddelta * xsimd::select(raw > V(kSoftplusThreshold), V(1.0f),
                                      mamba_native::cpu::sigmoid<Arch>(raw));
    }
    const V delta = V::load_unaligned(tile.delta + i);
    sum_D = xsimd::fma(g, u, sum_D);
    sum_bias = sum_bias + ddelta;
    xsimd::fma(delta, qB, skip * g).store_unaligned(tile.sum_qB + i);
    ddelta.store_unaligned(tile.sum_qAa + i);
  }
  sum_D.store_unaligned(lane_sums + kSumD * kWidth);
  sum_bias.store_unaligned(lane_sums + kSumBias * kWidth);
  store_tile<Arch>(params.du, place, channels, steps, tile.sum_qB);
  store_tile<Arch>(params.ddelta, place, channels, steps, tile.sum_qAa);
  if (in.z.dim >= 0) {
    load_tile<Arch>(in.z, place, channels, steps, tile.x);
    load_tile<Arch>(params.dout, place, channels, steps, tile.g);
    for (int i = 0; i < steps * kWidth; i += kWidth) {
      const V z = V::load_unaligned(tile.x + i);
      const V s = mamba_native::cpu::sigmoid<Arch>(z);
      const V slope = s * xsimd::fma(z, V(1.0f) - s, V(1.0f));
      (V::load_unaligned(tile.g + i) * V::load_unaligned(tile.y + i) * slope)
          .store_unaligned(tile.y + i);
    }
    store_tile<Arch>(params.dz, place, channels, steps, tile.y);
  }
}

template <class Arch>
using BackwardStates = void (*)(int steps, const float* a, const float* b, const float* c,
                                const float* h, const BackwardTile<Arch>& tile, float* quantities,
                                std::int64_t quantity_floats, float* dB, float* dC,
                                std::int64_t row);

template <class Arch>
BackwardStates<Arch> backward_complex_for(bool varying_B, bool varying_C) {
  static_assert(kBackwardStates == 2, "as many rows as a complex state has");
  if (varying_B) {
    return varying_C ? &backward_complex<Arch, true, true> : &backward_complex<Arch, true, false>;
  }
  return varying_C ? &backward_complex<Arch, false, true> : &backward_complex<Arch, false, false>;
}

template <class Arch, int STATES>
BackwardStates<Arch> backward_states_for(bool varying_B, bool varying_C) {
  if (varying_B) {
    return varying_C ? &backward_states<Arch, STATES, true, true>
                     : &backward_states<Arch, STATES, true, false>;
  }
  return varying_C ? &backward_states<Arch, STATES, false, true>
                   : &backward_states<Arch, STATES, false, false>;
}

inline constexpr int kBackwardTiles = 7;

template <class Arch>
std::int64_t backward_scratch(std::int64_t states, std::int64_t channels) {
  using A = Arena<Arch>;
  constexpr std::int64_t kTile = kBackwardSteps * kLanes<Arch>;
  return 2 * A::size_of(states * kBackwardSteps) + kBackwardTiles * A::size_of(kTile) +
         A::size_of(kBackwardStates * (kTile + kLanes<Arch> + A::kLine)) +
         A::size_of(kBackwardStates * (kTile + A::kLine)) + A::size_of(states * kLanes<Arch>) +
         A::size_of(BlockConstants<Arch>::kArrays * states * channels);
}

template <class Arch>
void backward_slice(const BackwardParams& params, const Slice& slice, const Segment& segment,
                    float* quantities, float* scratch) {
  constexpr int kWidth = kLanes<Arch>;
  constexpr int kTile = kBackwardSteps * kWidth;
  const Inputs& in = params.in;
  const std::int64_t states = count_rows(in);
  const std::int64_t length = in.u.size[2];
  const bool varying_B = in.B.dim >= 4;
  const bool varying_C = in.C.dim >= 4;
  const BackwardStates<Arch> run =
      in.A.dim == 3 ? backward_complex_for<Arch>(varying_B, varying_C)
                    : backward_states_for<Arch, kBackwardStates>(varying_B, varying_C);
  const BackwardStates<Arch> run_one = backward_states_for<Arch, 1>(varying_B, varying_C);
  const Sequences sequences = sequences_of(in, slice.batch);
  const std::int64_t row = (segment.last_tile - segment.first_tile) * kBackwardSteps;
  const std::int64_t block_floats = states * kWidth;

  Arena<Arch> arena(scratch);
  float* const rows_B = arena.take(states * kBackwardSteps);
  float* const rows_C = arena.take(states * kBackwardSteps);
  BackwardTile<Arch> tile;
  tile.u = arena.take(kTile);
  tile.delta = arena.take(kTile);
  tile.x = arena.take(kTile);
  tile.g = arena.take(kTile);
  tile.y = arena.take(kTile);
  tile.sum_qB = arena.take(kTile);
  tile.sum_qAa = arena.take(kTile);
  tile.history = arena.take(kBackwardStates * (kTile + kWidth + Arena<Arch>::kLine));
  tile.decays = arena.take(kBackwardStates * (kTile + Arena<Arch>::kLine));
  float* const h = arena.take(block_floats);
  float* const blocks = arena.take(BlockConstants<Arch>::kArrays * states *
                                   ((slice.count + kWidth - 1) / kWidth * kWidth));

  for (std::int64_t done = 0; done < slice.count; done += kWidth) {
    const int channels =
        static_cast<int>(slice.count - done < kWidth ? slice.count - done : kWidth);
    BlockConstants<Arch>(blocks + done / kWidth * BlockConstants<Arch>::kArrays * block_floats,
                         states)
        .load(in, slice.first + done, channels, states);
  }

  for (std::int64_t k = segment.last_tile - 1; k >= segment.first_tile; --k) {
    const std::int64_t start = k * kBackwardSteps;
    const int steps =
        static_cast<int>(length - start < kBackwardSteps ? length - start : kBackwardSteps);
    const int padded = (steps + kWidth - 1) / kWidth * kWidth;
    const std::int64_t in_segment = (k - segment.first_tile) * kBackwardSteps;
    if (varying_B) {
      load_rows<Arch, kBackwardSteps>(in, in.B, {slice.batch, slice.group, start}, steps, rows_B);
    }
    if (varying_C) {
      load_rows<Arch, kBackwardSteps>(in, in.C, {slice.batch, slice.group, start}, steps, rows_C);
    }
    for (std::int64_t done = 0; done < slice.count; done += kWidth) {
      const std::int64_t first = slice.first + done;
      const int channels =
          static_cast<int>(slice.count - done < kWidth ? slice.count - done : kWidth);
      const Place place = {slice.batch, first, start};
      const BlockConstants<Arch> constants(
          blocks + done / kWidth * BlockConstants<Arch>::kArrays * block_floats, states);
      float* const block_quantities = quantities + done * (kQuantities * states + kLaneSums);
      load_backward_tile<Arch>(params, place, channels, steps, padded, tile);
      const std::int64_t stride_B = projection_stride<Arch, kBackwardSteps>(in.B);
      const std::int64_t stride_C = projection_stride<Arch, kBackwardSteps>(in.C);
      const float* const b = varying_B ? rows_B : constants.b;
      const float* const c = varying_C ? rows_C : constants.c;
      float* const dB = varying_B ? segment.dB + in_segment : nullptr;
      float* const dC = varying_C ? segment.dC + in_segment : nullptr;
      // The part of each sequence that lies in the tile, last part first.
      float* const carry = block_quantities + kCarry * block_floats;
      for (std::int64_t end = start + steps, begin; end > start; end = begin) {
        begin = sequences.begin_of(end - 1, start);
        const bool begins = sequences.begins(begin);
        if (sequences.ends(end - 1)) {
          load_states<Arch>(in, params.dlast_state, sequences.leaving(end - 1), first, channels,
                            states, carry);
        }
        if (begins) {
          load_states<Arch>(in, in.initial_state, sequences.entering(begin), first, channels,
                            states, h);
        } else {
          const TensorView& stored = params.checkpoints;
          gather<Arch>(static_cast<const float*>(stored.data) + slice.batch * stored.stride[0] +
                           first * stored.stride[1] + k * states,
                       stored.stride[1], StateRows(), channels, states, h);
        }
        const std::int64_t from = begin - start;
        // Steps beyond the end of time are inert, and whole vectors of steps are faster.
        const int count = static_cast<int>(end == length ? padded - from : end - begin);
        for (std::int64_t n = 0; n < states;) {
          const bool several = n + kBackwardStates <= states;
          (several ? run : run_one)(count, constants.a + n * kWidth,
                                    b + n * stride_B + (varying_B ? from : 0),
                                    c + n * stride_C + (varying_C ? from : 0), h + n * kWidth,
                                    tile.from(from), block_quantities + n * kWidth, block_floats,
                                    varying_B ? dB + n * row + from : nullptr,
                                    varying_C ? dC + n * row + from : nullptr, row);
          n += several ? kBackwardStates : 1;
        }
        if (begins) {
          store_states<Arch>(in, params.dinitial_state, sequences.entering(begin), first, channels,
                             states, carry);
        }
      }

      store_backward_tile<Arch>(params, place, channels, steps, tile,
                                block_quantities + kQuantities * block_floats);
    }
  }
}

template <class Arch>
constexpr Kernels kernels() {
  return {kLanes<Arch>, &forward_scratch<Arch>, &forward_slice<Arch>, &backward_scratch<Arch>,
          &backward_slice<Arch>};
}

}  // namespace mamba_native::selective_scan::cpu
