// The scan in SIMD, written once and compiled per instruction set. The README derives the chunked
// form.
//
// Mapping: a chunk of steps becomes products of small float32 matrices. States are (P, padded N) as
// in memory; what has time and P is transposed to rows of time, (P, steps), so that every product
// is a broadcast element times a row of vectors.
//
// Decays within a chunk are running products of exp(delta A), never exponentials of differences of
// sums: as accurate as the recurrence, and nothing to overflow. What lies on the wrong side of the
// diagonal is masked.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/cpu/matmul.h"
#include "core/cpu/simd.h"
#include "core/cpu/transpose.h"
#include "core/math.h"
#include "core/sequences.h"
#include "ssd/cpu.h"

namespace mamba_native::ssd::cpu {

using mamba_native::cpu::kLanes;
using mamba_native::cpu::load;
using mamba_native::cpu::load_transposed;
using mamba_native::cpu::matmul;
using mamba_native::cpu::store_transposed;
using mamba_native::cpu::Vec;
using mamba_native::cpu::Zeros;

// Cuts aligned arrays out of the scratch that the caller gave. A line of padding after each keeps
// arrays of the same power-of-two size out of each other's cache sets, and catches the vector that
// reads beyond the last step. Without memory it only counts.
template <class Arch>
class Arena {
 public:
  MAMBA_ALWAYS_INLINE explicit Arena(float* memory) : memory_(memory) {}
  MAMBA_ALWAYS_INLINE float* take(std::int64_t count) {
    float* const first = memory_ == nullptr ? nullptr : memory_ + taken_;
    taken_ += (count + 15) / 16 * 16 + 16;
    return first;
  }
  std::int64_t taken() const { return taken_; }

 private:
  float* memory_;
  std::int64_t taken_ = 0;
};

// What a chunk's product of decays is below 2^-120 is 0: subnormal numbers are slow.
template <class Arch>
MAMBA_ALWAYS_INLINE Vec<Arch> without_tiny(Vec<Arch> value) {
  return xsimd::select(value < Vec<Arch>(0x1p-120f), Vec<Arch>(0.0f), value);
}
template <class Arch>
MAMBA_ALWAYS_INLINE float without_tiny(float value) {
  return value < 0x1p-120f ? 0.0f : value;
}

// 0, 1, 2, ...
template <class Arch>
MAMBA_ALWAYS_INLINE Vec<Arch> lane_numbers() {
  float numbers[kLanes<Arch>];
  for (int i = 0; i < kLanes<Arch>; ++i) {
    numbers[i] = static_cast<float>(i);
  }
  return Vec<Arch>::load_unaligned(numbers);
}

// ---- moving data between tensors and float arrays ----

template <class Arch>
MAMBA_ALWAYS_INLINE void zero(float* to, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    to[i] = 0.0f;
  }
}
template <class Arch>
MAMBA_ALWAYS_INLINE void copy(const float* from, std::int64_t count, float* to) {
  for (std::int64_t i = 0; i < count; ++i) {
    to[i] = from[i];
  }
}

// One (batch, step, head or group) of a (B, L, H, P) tensor.
template <class T>
MAMBA_ALWAYS_INLINE T* address(const TensorView& tensor, std::int64_t b, std::int64_t t,
                               std::int64_t h) {
  return tensor.as<T>() + b * tensor.stride[0] + t * tensor.stride[1] + h * tensor.stride[2];
}

template <class Arch, class T>
MAMBA_ALWAYS_INLINE void load_steps_of_head(const TensorView& tensor, std::int64_t b,
                                            std::int64_t begin, std::int64_t count, std::int64_t h,
                                            float* to, std::int64_t to_row) {
  load_transposed<Arch>(address<T>(tensor, b, begin, h), tensor.stride[1], tensor.stride[3], count,
                        tensor.size[3], to, to_row);
}

template <class Arch, class T>
MAMBA_ALWAYS_INLINE void store_steps_of_head(const float* from, std::int64_t from_row,
                                             const TensorView& tensor, std::int64_t b,
                                             std::int64_t begin, std::int64_t count,
                                             std::int64_t h) {
  store_transposed<Arch>(from, from_row, count, tensor.size[3], address<T>(tensor, b, begin, h),
                         tensor.stride[1], tensor.stride[3]);
}

// to[i * to_row + n] = from[i * row + n * column] for n < columns, zero up to to_row.
template <class Arch, class T>
void load_rows(const T* from, std::int64_t row, std::int64_t column, std::int64_t rows,
               std::int64_t columns, float* to, std::int64_t to_row) {
  for (std::int64_t i = 0; i < rows; ++i, from += row, to += to_row) {
    std::int64_t n = 0;
    for (; column == 1 && n + kLanes<Arch> <= columns; n += kLanes<Arch>) {
      load<Arch>(from + n).store_unaligned(to + n);
    }
    for (; n < columns; ++n) {
      to[n] = to_float(from[n * column]);
    }
    for (; n < to_row; ++n) {
      to[n] = 0.0f;
    }
  }
}

// A head's state, (P, padded N), from a row of a (rows, H, P, N) float32 tensor; 0 where there is
// no such row or no tensor.
template <class Arch>
void load_state(const TensorView& tensor, std::int64_t row, std::int64_t h, std::int64_t P,
                std::int64_t width, float* to) {
  if (tensor.dim < 0 || row < 0) {
    zero<Arch>(to, P * width);
    return;
  }
  load_rows<Arch>(tensor.as<float>() + row * tensor.stride[0] + h * tensor.stride[1],
                  tensor.stride[2], tensor.stride[3], P, tensor.size[3], to, width);
}

// `to` is one head's (P, N) with these strides.
template <class Arch>
void store_state(const float* from, std::int64_t width, float* to, std::int64_t row,
                 std::int64_t column, std::int64_t P, std::int64_t N) {
  for (std::int64_t p = 0; p < P; ++p) {
    for (std::int64_t n = 0; n < N; ++n) {
      to[p * row + n * column] = from[p * width + n];
    }
  }
}

template <class Arch>
void store_state(const float* from, std::int64_t width, const TensorView& tensor, std::int64_t row,
                 std::int64_t h) {
  if (tensor.dim >= 0 && row >= 0) {
    store_state<Arch>(from, width,
                      tensor.as<float>() + row * tensor.stride[0] + h * tensor.stride[1],
                      tensor.stride[2], tensor.stride[3], tensor.size[2], tensor.size[3]);
  }
}

// A head's state before block k, (P, N), contiguous.
MAMBA_ALWAYS_INLINE float* checkpoint(const TensorView& tensor, std::int64_t b, std::int64_t k,
                                      std::int64_t h) {
  return address<float>(tensor, b, k, h);
}

// delta and exp(delta A) of a head's steps; slope, if not null, is d delta / d dt. Arrays are
// written up to a multiple of 16.
template <class Arch>
void load_dt(const Inputs& in, std::int64_t b, std::int64_t begin, std::int64_t count,
             std::int64_t h, float* delta, float* decay, float* slope) {
  using V = Vec<Arch>;
  const std::int64_t first = b * in.dt.stride[0] + begin * in.dt.stride[1] + h * in.dt.stride[2];
  const float bias = in.dt_bias.dim < 0 ? 0.0f : in.dt_bias.as<float>()[h * in.dt_bias.stride[0]];
  const V A(in.A.as<float>()[h * in.A.stride[0]]);
  const V low(static_cast<float>(in.dt_min));
  const V high(static_cast<float>(in.dt_max));
  for (std::int64_t i = 0; i < count; i += kLanes<Arch>) {
    float raw[kLanes<Arch>] = {};
    for (std::int64_t k = 0; k < kLanes<Arch> && i + k < count; ++k) {
      const std::int64_t at = first + (i + k) * in.dt.stride[1];
      raw[k] = bias;
      switch (in.dt.dtype) {
        case DType::f32:
          raw[k] += in.dt.as<float>()[at];
          break;
        case DType::f16:
          raw[k] += to_float(in.dt.as<Half>()[at]);
          break;
        default:
          raw[k] += to_float(in.dt.as<BFloat16>()[at]);
          break;
      }
    }
    const V value = V::load_unaligned(raw);
    const V free = in.dt_softplus ? mamba_native::cpu::softplus<Arch>(value) : value;
    const V limited = xsimd::select(free < low, low, xsimd::select(free > high, high, free));
    limited.store_unaligned(delta + i);
    xsimd::exp(limited * A).store_unaligned(decay + i);
    if (slope != nullptr) {
      V of_free(1.0f);
      if (in.dt_softplus) {
        of_free = xsimd::select(value > V(kSoftplusThreshold), of_free,
                                mamba_native::cpu::sigmoid<Arch>(value));
      }
      of_free = xsimd::select(free < low, V(0.0f), xsimd::select(free > high, V(0.0f), of_free));
      of_free.store_unaligned(slope + i);
    }
  }
}

// ---- pieces of a chunk ----

// to[p][i] = from[p][i] * factor[i]
template <class Arch>
MAMBA_ALWAYS_INLINE void scale_steps(const float* from, std::int64_t from_row, const float* factor,
                                     std::int64_t P, std::int64_t steps, float* to,
                                     std::int64_t to_row) {
  for (std::int64_t p = 0; p < P; ++p, from += from_row, to += to_row) {
    for (std::int64_t i = 0; i < steps; i += kLanes<Arch>) {
      (Vec<Arch>::load_unaligned(from + i) * Vec<Arch>::load_unaligned(factor + i))
          .store_unaligned(to + i);
    }
  }
}

// since[i] = decay from before the chunk to step i, until[j] = decay from step j to the chunk's
// last.
template <class Arch>
MAMBA_ALWAYS_INLINE void chunk_decays(const float* decay, std::int64_t steps, float* since,
                                      float* until) {
  float product = 1.0f;
  for (std::int64_t i = 0; i < steps; ++i) {
    product = without_tiny<Arch>(product * decay[i]);
    since[i] = product;
  }
  product = 1.0f;
  for (std::int64_t j = steps; j-- > 0;) {
    until[j] = product;
    product = without_tiny<Arch>(product * decay[j]);
  }
}

MAMBA_ALWAYS_INLINE float skip_of(const Inputs& in, std::int64_t h, std::int64_t p) {
  if (in.D.dim < 0) {
    return 0.0f;
  }
  return in.D.as<float>()[h * in.D.stride[0] + (in.D.dim == 2 ? p * in.D.stride[1] : 0)];
}

// The end of the chunk that begins at step t.
MAMBA_ALWAYS_INLINE std::int64_t chunk_end(const Sequences& sequences, std::int64_t t,
                                           std::int64_t length) {
  return sequences.end_of(t, std::min(length, (t / kChunk + 1) * kChunk));
}

// The beginning of the chunk that ends before step t.
MAMBA_ALWAYS_INLINE std::int64_t chunk_begin(const Sequences& sequences, std::int64_t t) {
  const std::int64_t earliest = (--t) / kChunk * kChunk;
  while (t > earliest && !sequences.begins(t)) {
    --t;
  }
  return t;
}

// ---- forward ----

template <class Arch>
struct ForwardScratch {
  ForwardScratch(const Inputs& in, std::int64_t heads, float* memory) : arena(memory) {
    const std::int64_t P = in.x.size[3];
    const std::int64_t width = padded(in.B.size[3]);
    B = arena.take(kChunk * width);
    Ct = arena.take(width * kChunk);
    CBt = arena.take(kChunk * kChunk);
    Mt = arena.take(kChunk * kChunk);
    for (float** steps : {&x, &weighted_x, &y, &z}) {
      *steps = arena.take(P * kChunk);
    }
    for (float** row : {&delta, &decay, &since, &until}) {
      *row = arena.take(kChunk);
    }
    states = arena.take(heads * P * width);
  }

  Arena<Arch> arena;
  float* B;           // (steps, padded N)
  float* Ct;          // (N, steps)
  float* CBt;         // (steps j, steps i): B[j] . C[i]
  float* Mt;          // (steps j, steps i): what x[j] adds to y[i]
  float* x;           // (P, steps), as the next three
  float* weighted_x;  // what x adds to the chunk's last state
  float* y;
  float* z;
  float* delta;
  float* decay;
  float* since;
  float* until;
  float* states;  // (heads, P, padded N)
};

template <class Arch>
std::int64_t forward_scratch(const Inputs& in, std::int64_t heads) {
  return ForwardScratch<Arch>(in, heads, nullptr).arena.taken();
}

// Mt[j][i] = delta[j] (product of decay over (j, i]) CBt[j][i] for i >= j, else 0.
template <class Arch>
void forward_matrix(const ForwardScratch<Arch>& s, std::int64_t steps) {
  using V = Vec<Arch>;
  constexpr int kWidth = kLanes<Arch>;
  const V lanes = lane_numbers<Arch>();
  V decays[kChunk / kWidth];
  for (V& row : decays) {
    row = V(0.0f);
  }
  for (std::int64_t j = steps; j-- > 0;) {
    const V before(j + 1 < steps ? s.decay[j + 1] : 0.0f);
    const V delta(s.delta[j]);
    for (std::int64_t i = 0; i < steps; i += kWidth) {
      V& row = decays[i / kWidth];
      const V place = lanes + V(static_cast<float>(i - j));  // exact
      row = xsimd::select(place > V(0.0f), without_tiny<Arch>(row * before),
                          xsimd::select(place < V(0.0f), V(0.0f), V(1.0f)));
      const V value = row * delta * V::load_unaligned(s.CBt + j * kChunk + i);
      xsimd::select(place < V(0.0f), V(0.0f), value).store_unaligned(s.Mt + j * kChunk + i);
    }
  }
}

template <class Arch, class T>
void forward_chunk_of_head(const ForwardParams& params, const ForwardScratch<Arch>& s,
                           std::int64_t b, std::int64_t h, std::int64_t begin, std::int64_t steps,
                           float* state) {
  using V = Vec<Arch>;
  const Inputs& in = params.in;
  const std::int64_t P = in.x.size[3], N = in.B.size[3], width = padded(N);
  load_dt<Arch>(in, b, begin, steps, h, s.delta, s.decay, nullptr);
  chunk_decays<Arch>(s.decay, steps, s.since, s.until);
  load_steps_of_head<Arch, T>(in.x, b, begin, steps, h, s.x, kChunk);
  forward_matrix<Arch>(s, steps);

  // y = since (S C) + M x + D x
  matmul<Arch>({state, width, 1, s.Ct, kChunk, s.y, kChunk, P, steps, N});
  scale_steps<Arch>(s.y, kChunk, s.since, P, steps, s.y, kChunk);
  matmul<Arch>({s.x, kChunk, 1, s.Mt, kChunk, s.y, kChunk, P, steps, steps, Zeros::b_below, true});
  const bool has_gate = in.z.dim >= 0;
  if (has_gate) {
    load_steps_of_head<Arch, T>(in.z, b, begin, steps, h, s.z, kChunk);
  }
  for (std::int64_t p = 0; p < P; ++p) {
    const V skip(skip_of(in, h, p));
    for (std::int64_t i = p * kChunk; i < p * kChunk + steps; i += kLanes<Arch>) {
      V y = xsimd::fma(skip, V::load_unaligned(s.x + i), V::load_unaligned(s.y + i));
      if (has_gate) {
        y *= mamba_native::cpu::silu<Arch>(V::load_unaligned(s.z + i));
      }
      y.store_unaligned(s.y + i);
    }
  }
  store_steps_of_head<Arch, T>(s.y, kChunk, params.out, b, begin, steps, h);

  // S = since[last] S + (until delta x) B
  for (std::int64_t j = 0; j < steps; ++j) {
    s.until[j] *= s.delta[j];
  }
  scale_steps<Arch>(s.x, kChunk, s.until, P, steps, s.weighted_x, kChunk);
  matmul<Arch>({s.weighted_x, kChunk, 1, s.B, width, state, width, P, width, steps, Zeros::none,
                true, s.since[steps - 1]});
}

template <class Arch, class T>
void forward_slice(const ForwardParams& params, const Slice& slice, float* memory) {
  const Inputs& in = params.in;
  const std::int64_t b = slice.batch, length = in.x.size[1];
  const std::int64_t P = in.x.size[3], N = in.B.size[3], width = padded(N);
  const ForwardScratch<Arch> s(in, slice.count, memory);
  const Sequences sequences(in.seq_idx, b, length, in.sequences);
  for (std::int64_t begin = 0, end; begin < length; begin = end) {
    end = chunk_end(sequences, begin, length);
    const std::int64_t steps = end - begin;
    load_rows<Arch>(address<T>(in.B, b, begin, slice.group), in.B.stride[1], in.B.stride[3], steps,
                    N, s.B, width);
    load_transposed<Arch>(address<T>(in.C, b, begin, slice.group), in.C.stride[1], in.C.stride[3],
                          steps, N, s.Ct, kChunk);
    matmul<Arch>({s.B, width, 1, s.Ct, kChunk, s.CBt, kChunk, steps, steps, N, Zeros::out_below});
    for (std::int64_t i = 0; i < slice.count; ++i) {
      const std::int64_t h = slice.first + i;
      float* const state = s.states + i * P * width;
      const bool stores = params.checkpoints.dim >= 0 && begin % kCheckpointInterval == 0;
      const auto store_checkpoint = [&] {
        store_state<Arch>(state, width,
                          checkpoint(params.checkpoints, b, begin / kCheckpointInterval, h), N, 1,
                          P, N);
      };
      if (stores && begin > 0) {
        store_checkpoint();
      }
      if (sequences.begins(begin)) {
        load_state<Arch>(in.initial_states, sequences.entering(begin), h, P, width, state);
      }
      if (stores && begin == 0) {
        store_checkpoint();
      }
      forward_chunk_of_head<Arch, T>(params, s, b, h, begin, steps, state);
      if (sequences.ends(end - 1)) {
        store_state<Arch>(state, width, params.last_states, sequences.leaving(end - 1), h);
      }
    }
  }
}

// ---- backward ----

// A block of kCheckpointInterval steps at a time. Rows of steps are a vector longer than the block,
// because a chunk's last vector may reach beyond it.
inline constexpr std::int64_t kBlock = kCheckpointInterval;
inline constexpr std::int64_t kBlockRow = kBlock + 16;

template <class Arch>
struct BackwardScratch {
  BackwardScratch(const Inputs& in, float* memory) : arena(memory) {
    const std::int64_t P = in.x.size[3];
    const std::int64_t width = padded(in.B.size[3]);
    for (float** rows : {&B, &C}) {
      *rows = arena.take(kBlock * width);
    }
    for (float** rows : {&Bt, &Ct}) {
      *rows = arena.take(width * kBlockRow);
    }
    for (float** rows : {&CB, &dCB}) {
      *rows = arena.take(kBlock * kChunk);
    }
    for (float** steps : {&x, &g, &dz}) {
      *steps = arena.take(P * kBlockRow);
    }
    for (float** row : {&delta, &decay, &slope}) {
      *row = arena.take(kBlock);
    }
    for (float** steps : {&weighted_x, &weighted_g, &dx, &y}) {
      *steps = arena.take(P * kChunk);
    }
    for (float** matrix : {&W, &Wt, &D}) {
      *matrix = arena.take(kChunk * kChunk);
    }
    for (float** row : {&since, &until, &entering, &leaving, &direct, &within}) {
      *row = arena.take(kChunk);
    }
    dC = arena.take(kChunk * width);
    for (float** state : {&states, &initial, &adjoint}) {
      *state = arena.take(P * width * (state == &states ? kBlock / kChunk : 1));
    }
  }

  Arena<Arch> arena;
  // The block, for all heads.
  float* B;    // (steps, padded N)
  float* C;    // (steps, padded N)
  float* Bt;   // (N, kBlockRow)
  float* Ct;   // (N, kBlockRow)
  float* CB;   // (steps i, kChunk j): C[i] . B[j] for j in the chunk of i
  float* dCB;  // the same, summed over heads
  // The block, for one head.
  float* x;   // (P, kBlockRow)
  float* g;   // (P, kBlockRow): dL/dy
  float* dz;  // (P, kBlockRow): dL/dz over y
  float* delta;
  float* decay;
  float* slope;
  // One chunk of one head.
  float* weighted_x;  // (P, kChunk), as the next three
  float* weighted_g;
  float* dx;
  float* y;
  float* W;  // (i, kChunk j): CB times the decay from j to i
  float* Wt;
  float* D;  // (i, kChunk j): g[i] . x[j]
  float* since;
  float* until;
  float* entering;  // (i): what the exponent of all steps to i gets from the entering state
  float* leaving;   // (j): what the exponent of all steps after j gets from the leaving state
  float* direct;    // (j): dL/d delta but for the exponents
  float* within;    // (t): what the exponent of step t gets from pairs of steps
  float* dC;        // (steps, padded N)
  float* states;    // (kBlock / kChunk, P, padded N): before each chunk that continues a sequence
  float* initial;   // (P, padded N): before a chunk that begins one
  float* adjoint;   // (P, padded N): of the state that leaves the chunk
};

template <class Arch>
std::int64_t backward_scratch(const Inputs& in) {
  return BackwardScratch<Arch>(in, nullptr).arena.taken();
}

// One head's part of a block.
template <class Arch, class T>
class BackwardHead {
 public:
  BackwardHead(const BackwardParams& params, const BackwardScratch<Arch>& scratch,
               const Sequences& sequences, std::int64_t batch, std::int64_t head,
               std::int64_t begin, std::int64_t end)
      : params_(params),
        in_(params.in),
        s(scratch),
        sequences_(sequences),
        b_(batch),
        h_(head),
        block_(begin),
        block_end_(end),
        P_(in_.x.size[3]),
        N_(in_.B.size[3]),
        width_(padded(N_)) {}

  // `carry` is the adjoint of the state after the block on entry, before it on exit. dB and dC are
  // the block's, (steps, padded N), and added to.
  void run(float* carry, float* dB, float* dC, double* dA, double* ddt_bias, double* dD) {
    load(dD);
    recompute_states();
    copy<Arch>(carry, P_ * width_, s.adjoint);
    for (std::int64_t end = block_end_, begin; end > block_; end = begin) {
      begin = chunk_begin(sequences_, end);
      chunk(begin, end - begin, dB + (begin - block_) * width_, dC + (begin - block_) * width_, dA,
            ddt_bias);
    }
    copy<Arch>(s.adjoint, P_ * width_, carry);
  }

 private:
  using V = Vec<Arch>;
  static constexpr int kWidth = kLanes<Arch>;

  void load(double* dD) {
    const std::int64_t count = block_end_ - block_;
    load_dt<Arch>(in_, b_, block_, count, h_, s.delta, s.decay, s.slope);
    load_steps_of_head<Arch, T>(in_.x, b_, block_, count, h_, s.x, kBlockRow);
    load_steps_of_head<Arch, T>(params_.dout, b_, block_, count, h_, s.g, kBlockRow);
    const bool has_gate = in_.z.dim >= 0;
    if (has_gate) {
      load_steps_of_head<Arch, T>(in_.z, b_, block_, count, h_, s.dz, kBlockRow);
    }
    for (std::int64_t p = 0; p < P_; ++p) {
      V sum(0.0f);
      for (std::int64_t i = p * kBlockRow; i < p * kBlockRow + count; i += kWidth) {
        V g = V::load_unaligned(s.g + i);
        if (has_gate) {
          const V z = V::load_unaligned(s.dz + i);
          const V sigmoid = mamba_native::cpu::sigmoid<Arch>(z);
          const V slope = sigmoid * (V(1.0f) + z * (V(1.0f) - sigmoid));
          (g * slope).store_unaligned(s.dz + i);
          g *= z * sigmoid;
          g.store_unaligned(s.g + i);
        }
        sum = xsimd::fma(g, V::load_unaligned(s.x + i), sum);
      }
      dD[p] += static_cast<double>(xsimd::reduce_add(sum));
    }
  }

  float* state_before(std::int64_t begin) const {
    return s.states + (begin - block_) / kChunk * P_ * width_;
  }

  const float* entering_state(std::int64_t begin) const {
    if (!sequences_.begins(begin)) {
      return state_before(begin);
    }
    load_state<Arch>(in_.initial_states, sequences_.entering(begin), h_, P_, width_, s.initial);
    return s.initial;
  }

  // The block's states again, from its checkpoint.
  void recompute_states() {
    load_rows<Arch>(checkpoint(params_.checkpoints, b_, block_ / kCheckpointInterval, h_), N_, 1,
                    P_, N_, s.states, width_);
    for (std::int64_t begin = block_, end; begin < block_end_; begin = end) {
      end = chunk_end(sequences_, begin, block_end_);
      if (end == block_end_ || sequences_.begins(end)) {
        continue;  // nobody continues from here
      }
      const float* const state = entering_state(begin);
      const std::int64_t steps = end - begin, at = begin - block_;
      chunk_decays<Arch>(s.decay + at, steps, s.since, s.until);
      weigh(s.x + at, s.until, s.delta + at, steps, s.weighted_x);
      float* const next = state_before(end);
      copy<Arch>(state, P_ * width_, next);
      matmul<Arch>({s.weighted_x, kChunk, 1, s.B + at * width_, width_, next, width_, P_, width_,
                    steps, Zeros::none, true, s.since[steps - 1]});
    }
  }

  // to = rows of steps times factor times delta
  void weigh(const float* rows, const float* factor, const float* delta, std::int64_t steps,
             float* to) const {
    float both[kChunk];
    for (std::int64_t i = 0; i < (steps + 15) / 16 * 16; ++i) {
      both[i] = i < steps ? factor[i] * delta[i] : 0.0f;
    }
    scale_steps<Arch>(rows, kBlockRow, both, P_, steps, to, kChunk);
  }

  // W, and what the pairs of steps give to dCB and to the exponents. The exponent of step t gets
  // sum over j < t <= i of K[i][j], K = D W delta: column sums of the rows from t on, summed up to
  // t.
  void pairs(std::int64_t at, std::int64_t steps) {
    const V lanes = lane_numbers<Arch>();
    const V none(0.0f);
    V decays[kChunk / kWidth];
    for (V& row : decays) {
      row = none;
    }
    for (std::int64_t i = 0; i < steps; ++i) {
      const V step(s.decay[at + i]);
      for (std::int64_t j = 0; j < steps; j += kWidth) {
        V& row = decays[j / kWidth];
        const V place = lanes + V(static_cast<float>(j - i));  // exact
        row = xsimd::select(place < none, without_tiny<Arch>(row * step),
                            xsimd::select(place > none, none, V(1.0f)));
        const V decay_delta = row * V::load_unaligned(s.delta + at + j);
        const V product = V::load_unaligned(s.D + i * kChunk + j) * decay_delta;
        const V CB = V::load_unaligned(s.CB + (at + i) * kChunk + j);
        const V dCB = V::load_unaligned(s.dCB + (at + i) * kChunk + j);
        xsimd::select(place > none, none, row * CB).store_unaligned(s.W + i * kChunk + j);
        xsimd::select(place > none, none, dCB + product)
            .store_unaligned(s.dCB + (at + i) * kChunk + j);
        (product * CB).store_unaligned(s.D + i * kChunk + j);  // K
      }
    }
    V columns[kChunk / kWidth];
    for (V& column : columns) {
      column = none;
    }
    for (std::int64_t t = steps; t-- > 0;) {
      V sum = none;
      for (std::int64_t j = 0; j <= t; j += kWidth) {
        V& column = columns[j / kWidth];
        column += V::load_unaligned(s.D + t * kChunk + j);
        sum += xsimd::select(lanes < V(static_cast<float>(t - j)), column, none);
      }
      s.within[t] = xsimd::reduce_add(sum);
    }
  }

  void chunk(std::int64_t begin, std::int64_t steps, float* dB, float* dC, double* dA,
             double* ddt_bias) {
    const std::int64_t at = begin - block_, end = begin + steps;
    if (sequences_.ends(end - 1)) {
      load_state<Arch>(params_.dlast_states, sequences_.leaving(end - 1), h_, P_, width_,
                       s.adjoint);
    }
    const float* const state = entering_state(begin);
    chunk_decays<Arch>(s.decay + at, steps, s.since, s.until);
    weigh(s.x + at, s.until, s.delta + at, steps, s.weighted_x);
    scale_steps<Arch>(s.g + at, kBlockRow, s.since, P_, steps, s.weighted_g, kChunk);
    matmul<Arch>({s.g + at, 1, kBlockRow, s.x + at, kBlockRow, s.D, kChunk, steps, steps, P_,
                  Zeros::out_above});
    pairs(at, steps);

    // dx / delta = until (R B) + W^T g
    matmul<Arch>({s.adjoint, width_, 1, s.Bt + at, kBlockRow, s.dx, kChunk, P_, steps, N_});
    scale_steps<Arch>(s.dx, kChunk, s.until, P_, steps, s.dx, kChunk);
    dot_over_P(s.dx, s.x + at, steps, s.leaving);
    matmul<Arch>({s.g + at, kBlockRow, 1, s.W, kChunk, s.dx, kChunk, P_, steps, steps,
                  Zeros::b_above, true});
    dot_over_P(s.dx, s.x + at, steps, s.direct);
    for (std::int64_t p = 0; p < P_; ++p) {
      const V skip(skip_of(in_, h_, p));
      for (std::int64_t j = 0; j < steps; j += kWidth) {
        float* const place = s.dx + p * kChunk + j;
        (V::load_unaligned(place) * V::load_unaligned(s.delta + at + j) +
         skip * V::load_unaligned(s.g + p * kBlockRow + at + j))
            .store_unaligned(place);
      }
    }
    store_steps_of_head<Arch, T>(s.dx, kChunk, params_.dx, b_, begin, steps, h_);

    if (in_.z.dim >= 0) {
      gate_gradient(state, begin, steps);
    }

    // dC = since (S^T g), dB = (until delta x) R, both summed over heads; dCB adds its part later
    matmul<Arch>({s.weighted_g, 1, kChunk, state, width_, s.dC, width_, steps, width_, P_});
    for (std::int64_t i = 0; i < steps; ++i) {
      V sum(0.0f);
      for (std::int64_t n = 0; n < width_; n += kWidth) {
        const V part = V::load_unaligned(s.dC + i * width_ + n);
        sum = xsimd::fma(part, V::load_unaligned(s.C + (at + i) * width_ + n), sum);
        (V::load_unaligned(dC + i * width_ + n) + part).store_unaligned(dC + i * width_ + n);
      }
      s.entering[i] = xsimd::reduce_add(sum);
    }
    matmul<Arch>({s.weighted_x, 1, kChunk, s.adjoint, width_, dB, width_, steps, width_, P_,
                  Zeros::none, true});

    const float through = s.since[steps - 1];
    V whole(0.0f);
    for (std::int64_t i = 0; i < P_ * width_; i += kWidth) {
      whole = xsimd::fma(V::load_unaligned(s.adjoint + i), V::load_unaligned(state + i), whole);
    }
    exponents(begin, steps, through * xsimd::reduce_add(whole), dA, ddt_bias);

    // R = since[last] R + since g C^T, the last step, which has decayed most, first: as the
    // recurrence adds them, small numbers before large ones
    matmul<Arch>({s.weighted_g + steps - 1, kChunk, -1, s.C + (at + steps - 1) * width_, -width_,
                  s.adjoint, width_, P_, width_, steps, Zeros::none, true, through});
    if (sequences_.begins(begin)) {
      store_state<Arch>(s.adjoint, width_, params_.dinitial_states, sequences_.entering(begin), h_);
    }
  }

  // to[j] = sum over p of a[p][j] b[p][j], a with rows of kChunk, b of kBlockRow
  void dot_over_P(const float* a, const float* b, std::int64_t steps, float* to) const {
    for (std::int64_t j = 0; j < steps; j += kWidth) {
      V sum(0.0f);
      for (std::int64_t p = 0; p < P_; ++p) {
        sum = xsimd::fma(V::load_unaligned(a + p * kChunk + j),
                         V::load_unaligned(b + p * kBlockRow + j), sum);
      }
      sum.store_unaligned(to + j);
    }
  }

  // dz, for which y is computed again.
  void gate_gradient(const float* state, std::int64_t begin, std::int64_t steps) {
    const std::int64_t at = begin - block_;
    matmul<Arch>({state, width_, 1, s.Ct + at, kBlockRow, s.y, kChunk, P_, steps, N_});
    scale_steps<Arch>(s.y, kChunk, s.since, P_, steps, s.y, kChunk);
    load_transposed<Arch>(s.W, kChunk, 1, steps, steps, s.Wt, kChunk);
    scale_steps<Arch>(s.x + at, kBlockRow, s.delta + at, P_, steps, s.dx, kChunk);
    matmul<Arch>(
        {s.dx, kChunk, 1, s.Wt, kChunk, s.y, kChunk, P_, steps, steps, Zeros::b_below, true});
    for (std::int64_t p = 0; p < P_; ++p) {
      const V skip(skip_of(in_, h_, p));
      for (std::int64_t i = 0; i < steps; i += kWidth) {
        const std::int64_t in_block = p * kBlockRow + at + i;
        float* const place = s.y + p * kChunk + i;
        const V y = xsimd::fma(skip, V::load_unaligned(s.x + in_block), V::load_unaligned(place));
        (y * V::load_unaligned(s.dz + in_block)).store_unaligned(place);
      }
    }
    store_steps_of_head<Arch, T>(s.y, kChunk, params_.dz, b_, begin, steps, h_);
  }

  // dL/d(delta A) of every step, and ddt, dA and ddt_bias from it.
  void exponents(std::int64_t begin, std::int64_t steps, float whole, double* dA,
                 double* ddt_bias) const {
    const std::int64_t at = begin - block_;
    const float A = in_.A.template as<float>()[h_ * in_.A.stride[0]];
    float* const from_before = s.entering;  // becomes the sum from t on
    for (std::int64_t t = steps - 1; t-- > 0;) {
      from_before[t] += from_before[t + 1];
    }
    float to_after = 0.0f;
    for (std::int64_t t = 0; t < steps; ++t) {
      const float exponent = s.within[t] + from_before[t] + to_after + whole;
      to_after += s.leaving[t] * s.delta[at + t];
      const float ddt = s.slope[at + t] * (s.direct[t] + A * exponent);
      const std::int64_t place = b_ * params_.ddt.stride[0] + (begin + t) * params_.ddt.stride[1] +
                                 h_ * params_.ddt.stride[2];
      if (params_.ddt.dtype == DType::f32) {
        params_.ddt.template as<float>()[place] = ddt;
      } else {
        mamba_native::cpu::assign<Arch>(params_.ddt.template as<T>() + place, ddt);
      }
      *dA += static_cast<double>(s.delta[at + t] * exponent);
      *ddt_bias += static_cast<double>(ddt);
    }
  }

  const BackwardParams& params_;
  const Inputs& in_;
  const BackwardScratch<Arch>& s;
  const Sequences& sequences_;
  std::int64_t b_;
  std::int64_t h_;
  std::int64_t block_;
  std::int64_t block_end_;
  std::int64_t P_;
  std::int64_t N_;
  std::int64_t width_;
};

template <class Arch, class T>
void backward_slice(const BackwardParams& params, const Slice& slice, const Stretch& stretch,
                    const Sums& sums, float* memory) {
  const Inputs& in = params.in;
  const std::int64_t b = slice.batch, P = in.x.size[3], N = in.B.size[3], width = padded(N);
  const BackwardScratch<Arch> s(in, memory);
  const Sequences sequences(in.seq_idx, b, in.x.size[1], in.sequences);
  zero<Arch>(stretch.dB, (stretch.end - stretch.begin) * width);
  zero<Arch>(stretch.dC, (stretch.end - stretch.begin) * width);
  for (std::int64_t end = stretch.end, block; end > stretch.begin; end = block) {
    block = (end - 1) / kBlock * kBlock;
    const std::int64_t count = end - block;
    const auto load_projection = [&](const TensorView& tensor, float* rows, float* columns) {
      const T* const from = address<T>(tensor, b, block, slice.group);
      load_rows<Arch>(from, tensor.stride[1], tensor.stride[3], count, N, rows, width);
      load_transposed<Arch>(from, tensor.stride[1], tensor.stride[3], count, N, columns, kBlockRow);
    };
    load_projection(in.B, s.B, s.Bt);
    load_projection(in.C, s.C, s.Ct);
    zero<Arch>(s.dCB, kBlock * kChunk);
    for (std::int64_t t = block, next; t < end; t = next) {
      next = chunk_end(sequences, t, end);
      matmul<Arch>({s.C + (t - block) * width, width, 1, s.Bt + (t - block), kBlockRow,
                    s.CB + (t - block) * kChunk, kChunk, next - t, next - t, N, Zeros::out_above});
    }
    float* const dB = stretch.dB + (block - stretch.begin) * width;
    float* const dC = stretch.dC + (block - stretch.begin) * width;
    for (std::int64_t i = 0; i < slice.count; ++i) {
      BackwardHead<Arch, T>(params, s, sequences, b, slice.first + i, block, end)
          .run(sums.carry + i * P * width, dB, dC, sums.dA + i, sums.ddt_bias + i, sums.dD + i * P);
    }
    for (std::int64_t t = block, next; t < end; t = next) {
      next = chunk_end(sequences, t, end);
      const std::int64_t at = t - block, steps = next - t;
      const float* const dCB = s.dCB + at * kChunk;
      matmul<Arch>({dCB, kChunk, 1, s.B + at * width, width, dC + at * width, width, steps, width,
                    steps, Zeros::a_above, true});
      matmul<Arch>({dCB, 1, kChunk, s.C + at * width, width, dB + at * width, width, steps, width,
                    steps, Zeros::a_below, true});
    }
  }
}

// ---- what the instruction set offers ----

template <class Arch>
void forward_any(const ForwardParams& params, const Slice& slice, float* scratch) {
  for_dtype(params.in.x.dtype,
            [&](auto type) { forward_slice<Arch, decltype(type)>(params, slice, scratch); });
}

template <class Arch>
void backward_any(const BackwardParams& params, const Slice& slice, const Stretch& stretch,
                  const Sums& sums, float* scratch) {
  for_dtype(params.in.x.dtype, [&](auto type) {
    backward_slice<Arch, decltype(type)>(params, slice, stretch, sums, scratch);
  });
}

template <class Arch>
Kernels kernels() {
  return {&forward_scratch<Arch>, &forward_any<Arch>, &backward_scratch<Arch>, &backward_any<Arch>};
}

}  // namespace mamba_native::ssd::cpu
