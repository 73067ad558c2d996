// The scan with complex A, forward and backward, in the mapping of the real kernels' lanes over
// time: a warp per channel, a lane = kItems steps of a tile, the states in turn. It is the rare
// case, so one kernel per direction reads every dtype and knows everything that the operation
// offers.
#include "selective_scan/complex.h"

#include "core/cuda/any_dtype.cuh"
#include "core/cuda/launch.h"
#include "selective_scan/backward.cuh"
#include "selective_scan/plan.h"
#include "selective_scan/scan_order.h"
#include "selective_scan/tensors.cuh"

namespace mamba_native::selective_scan::cuda {
namespace {

using mamba_native::cuda::load_stored;
using mamba_native::cuda::store_stored;
using mamba_native::cuda::Stored;
using mamba_native::cuda::to_floats;
using mamba_native::cuda::to_stored;

// ---- arithmetic ----

struct Complex {
  float re = 0.0f, im = 0.0f;
};

__device__ __forceinline__ Complex operator*(float a, Complex b) { return {a * b.re, a * b.im}; }
__device__ __forceinline__ Complex operator*(Complex a, Complex b) {
  return {fmaf(a.re, b.re, -(a.im * b.im)), fmaf(a.re, b.im, a.im * b.re)};
}
__device__ __forceinline__ Complex conj(Complex a) { return {a.re, -a.im}; }
// a b + c
__device__ __forceinline__ Complex fma(Complex a, Complex b, Complex c) {
  return {fmaf(a.re, b.re, fmaf(-a.im, b.im, c.re)), fmaf(a.re, b.im, fmaf(a.im, b.re, c.im))};
}
__device__ __forceinline__ Complex fma(float a, Complex b, Complex c) {
  return {fmaf(a, b.re, c.re), fmaf(a, b.im, c.im)};
}
// Re(a conj(b)): what real numbers see of a product's gradient.
__device__ __forceinline__ float dot(Complex a, Complex b) { return fmaf(a.re, b.re, a.im * b.im); }

__device__ __forceinline__ Complex from_lane(Complex a, int lane) {
  return {__shfl_sync(kAllLanes, a.re, lane), __shfl_sync(kAllLanes, a.im, lane)};
}
__device__ __forceinline__ Complex from_before(Complex a, int lanes) {
  return {__shfl_up_sync(kAllLanes, a.re, lanes), __shfl_up_sync(kAllLanes, a.im, lanes)};
}
__device__ __forceinline__ Complex from_after(Complex a, int lanes) {
  return {__shfl_down_sync(kAllLanes, a.re, lanes), __shfl_down_sync(kAllLanes, a.im, lanes)};
}

// exp(delta A) = 2^(delta growth) e^(i pi delta turns). The turns are a sum of two floats: an angle
// is as good as its last bit, however many turns came before, and whole turns come off exactly.
class Rate {
 public:
  __device__ __forceinline__ explicit Rate(Complex A) : growth_(A.re * kLog2E) {
    constexpr float kInversePi = 0.31830987334251404f;
    constexpr float kRest = 1.2841276486e-8f;  // 1/pi - kInversePi
    turns_ = A.im * kInversePi;
    rest_ = fmaf(A.im, kRest, fmaf(A.im, kInversePi, -turns_));
  }

  __device__ __forceinline__ Complex decay(float delta) const {
    const float turns = delta * turns_;
    const float rest = fmaf(delta, rest_, fmaf(delta, turns_, -turns));
    float sine, cosine;
    sincospif(fmaf(-2.0f, rintf(0.5f * turns), turns) + rest, &sine, &cosine);
    const float size = exp2_approx(delta * growth_);
    return {size * cosine, size * sine};
  }

 private:
  float growth_, turns_, rest_;
};

// ---- tensors ----

// (B, D, L) of a dtype that is known at run time.
struct Steps {
  void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t batch = 0, channel = 0, step = 0;
  bool vectorize = false;  // kItems steps from a multiple of kItems on are whole vectors

  // Where `valid` of the kItems steps from `first` on lie: the lowest address of a whole vector.
  __device__ __forceinline__ std::int64_t offset(int b, int c, std::int64_t first,
                                                 bool mirrored) const {
    return b * batch + c * channel + (mirrored ? first + kItems - 1 : first) * step;
  }
  __device__ __forceinline__ bool mirrored(int valid) const {
    return vectorize && step < 0 && valid >= kItems;
  }
  // Steps from `valid` on are zero.
  __device__ __forceinline__ void read(int b, int c, std::int64_t first, int valid,
                                       float (&to)[kItems]) const {
    const bool last_first = mirrored(valid);
    to_floats(
        load_stored<kItems>(data, dtype, offset(b, c, first, last_first), step, valid, vectorize),
        dtype, to);
    if (last_first) {
      reverse_items(to);
    }
  }
  // Reverses `values` where they lie last first.
  __device__ __forceinline__ void store(int b, int c, std::int64_t first, int valid,
                                        float (&values)[kItems]) const {
    const bool last_first = mirrored(valid);
    if (last_first) {
      reverse_items(values);
    }
    store_stored<kItems>(data, dtype, offset(b, c, first, last_first), step, valid, vectorize,
                         to_stored(values, dtype));
  }
};

// (B or S, D, N, 2), or (D, N, 2) with batch = 0.
template <class Float>
struct States {
  Float* data = nullptr;
  std::int64_t batch = 0, channel = 0, state = 0, part = 0;

  // A number of row `row`, or zero where there is no such row or no tensor.
  __device__ __forceinline__ Complex get(int row, int c, int n) const {
    if (data == nullptr || row < 0) {
      return {};
    }
    const Float* const at = data + row * batch + c * channel + n * state;
    return {at[0], at[part]};
  }
  // Nothing happens where there is no such row or no tensor.
  __device__ __forceinline__ void set(int row, int c, int n, Complex value) const {
    if (data != nullptr && row >= 0) {
      Float* const at = data + row * batch + c * channel + n * state;
      at[0] = value.re;
      at[part] = value.im;
    }
  }
};

// B or C: (B, G, N, L, 2) of any dtype, or `constant`, (D, N, 2) in float.
struct ComplexCoefficient {
  States<const float> constant;
  const void* varying = nullptr;
  DType dtype = DType::f32;
  std::int64_t batch = 0, group = 0, state = 0, step = 0, part = 0;
  bool vectorize = false;  // kItems steps from a multiple of kItems on are whole vectors

  // State n of kItems steps; those from `valid` on are zero where they vary.
  __device__ __forceinline__ void read(int b, int g, int c, int n, std::int64_t first, int valid,
                                       Complex (&to)[kItems]) const {
    if (varying == nullptr) {
      const Complex value = constant.get(0, c, n);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        to[i] = value;
      }
      return;
    }
    const std::int64_t at = b * batch + g * group + n * state + first * step;
    float one[kItems], other[kItems];
    if (!vectorize || valid < kItems) {
      to_floats(load_stored<kItems>(varying, dtype, at, step, valid, false), dtype, one);
      to_floats(load_stored<kItems>(varying, dtype, at + part, step, valid, false), dtype, other);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        to[i] = {one[i], other[i]};
      }
      return;
    }
    const std::int64_t lowest = step > 0 ? at : at + (kItems - 1) * step;
    to_floats(load_stored<kItems>(varying, dtype, lowest, 1, kItems, true), dtype, one);
    to_floats(load_stored<kItems>(varying, dtype, lowest + kItems, 1, kItems, true), dtype, other);
    constexpr int kHalf = kItems / 2;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      to[i] = {one[2 * i], one[2 * i + 1]};
      to[kHalf + i] = {other[2 * i], other[2 * i + 1]};
    }
    if (step < 0) {
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        const Complex last = to[kItems - 1 - i];
        to[kItems - 1 - i] = to[i];
        to[i] = last;
      }
    }
  }
};

// What forward and backward both read.
struct ComplexInputs {
  int channels, channels_per_group, groups, d_state;
  int tiles;  // of kCheckpointInterval steps
  std::int64_t length;
  Steps u, delta, z;
  States<const float> A, initial_state;
  ComplexCoefficient B, C;
  Weights<const float> D, delta_bias;
  DeviceSequences<Scope::packed> sequences;
  bool delta_softplus;
};

struct ComplexForwardArgs {
  ComplexInputs in;
  Steps out;
  States<float> last_state;
  float* checkpoints;  // (B, D, tiles, N, 2), contiguous
};

struct ComplexBackwardArgs {
  ComplexInputs in;
  Steps dout, du, ddelta, dz;
  States<const float> dlast_state;
  States<float> dinitial_state;
  const float* checkpoints;
  // Arrays of complex numbers are two: real parts, then imaginary parts, but for the adjoint's.
  Parts parts;

  // h before step first + i of state n: the sequence's own where it begins, else `h`.
  __device__ __forceinline__ Complex state_before(const Cuts& cuts, int b, int c, int n,
                                                  std::int64_t first, int i, Complex h) const {
    return (cuts.begins >> i & 1u) == 0u
               ? h
               : in.initial_state.get(in.sequences.entering(b, first + i), c, n);
  }
  // The adjoint that reaches step first + i from later steps: that of its sequence's last state
  // where it is the last one, else `q`.
  __device__ __forceinline__ Complex adjoint_after(const Cuts& cuts, int b, int c, int n,
                                                   std::int64_t first, int i, Complex q) const {
    return (cuts.ends >> i & 1u) == 0u ? q
                                       : dlast_state.get(in.sequences.leaving(b, first + i), c, n);
  }
};

// ---- forward ----

constexpr int kThreads = kComplexWarps * kWarp;

//   grid    (b, block of kComplexWarps channels), one dimension
//   CTA     warp = one channel, lane = kItems steps of a tile of kCheckpointInterval steps
__global__ void __launch_bounds__(kThreads, 3) scan_complex(const ComplexForwardArgs args) {
  const ComplexInputs& in = args.in;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int blocks = (in.channels + kComplexWarps - 1) / kComplexWarps;
  const int b = static_cast<int>(blockIdx.x) / blocks;
  const int c =
      static_cast<int>(blockIdx.x) % blocks * kComplexWarps + static_cast<int>(threadIdx.x) / kWarp;
  if (c >= in.channels) {
    return;  // a whole warp, and no barrier waits for it
  }
  const int group = c / in.channels_per_group;
  const float bias = in.delta_bias.get(0, c, 0);
  const float skip = in.D.get(0, c, 0);

  for (int tile = 0; tile < in.tiles; ++tile) {
    const std::int64_t first =
        static_cast<std::int64_t>(tile) * kCheckpointInterval + lane * kItems;
    const int valid = valid_items(in.length, first);
    float delta[kItems], x[kItems], y[kItems];
    float elapsed = 0.0f;  // sum of delta over the lane's steps
    in.delta.read(b, c, first, valid, delta);
    in.u.read(b, c, first, valid, x);
    discretise(delta, bias, in.delta_softplus, valid);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      y[i] = skip * x[i];
      x[i] *= delta[i];
      elapsed += delta[i];
    }
    const Cuts cuts = cuts_of(in.sequences, b, first, lane, true);
    float* checkpoint = args.checkpoints + 2 * checkpoint_offset(in, b, c, tile);

#pragma unroll 1
    for (int n = 0; n < in.d_state; ++n, checkpoint += 2) {
      const Rate rate(in.A.get(0, c, n));
      // The last lane stored what the tile before this one left.
      Complex entering;
      if (lane == kWarp - 1) {
        if (tile == 0) {
          entering = in.initial_state.get(in.sequences.entering(b, 0), c, n);
          checkpoint[0] = entering.re;
          checkpoint[1] = entering.im;
        } else {
          entering = {checkpoint[0], checkpoint[1]};
        }
      }
      entering = from_lane(entering, kWarp - 1);

      Complex decay[kItems], input[kItems];
      in.B.read(b, group, c, n, first, valid, input);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        decay[i] = rate.decay(delta[i]);
        input[i] = x[i] * input[i];
        if ((cuts.begins >> i & 1u) != 0u) {
          const int from = in.sequences.entering(b, first + i);
          input[i] = fma(decay[i], in.initial_state.get(from, c, n), input[i]);
        }
      }
      Complex span = rate.decay(elapsed);
      Complex h = input[0];
#pragma unroll
      for (int i = 1; i < kItems; ++i) {
        h = (cuts.begins >> i & 1u) != 0u ? input[i] : fma(decay[i], h, input[i]);
      }
#pragma unroll
      for (int offset = 1; offset < kWarp; offset *= 2) {
        const Complex before = from_before(h, offset);
        const Complex span_before = from_before(span, offset);
        if (offset <= cuts.before) {
          h = fma(span, before, h);
          span = span * span_before;
        }
      }
      const Complex leaving = cuts.from_start ? fma(span, entering, h) : h;
      if (lane == kWarp - 1) {
        if (tile + 1 < in.tiles) {
          checkpoint[2 * in.d_state] = leaving.re;
          checkpoint[2 * in.d_state + 1] = leaving.im;
        } else {
          args.last_state.set(in.sequences.leaving(b, in.length - 1), c, n, leaving);
        }
      }
      h = from_before(leaving, 1);
      h = lane == 0 ? entering : h;
      Complex c_values[kItems];
      in.C.read(b, group, c, n, first, valid, c_values);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        h = (cuts.begins >> i & 1u) != 0u ? input[i] : fma(decay[i], h, input[i]);
        y[i] = fmaf(2.0f, dot(c_values[i], conj(h)), y[i]);
        if ((cuts.ends >> i & 1u) != 0u) {
          args.last_state.set(in.sequences.leaving(b, first + i), c, n, h);
        }
      }
    }

    if (in.z.data != nullptr) {
      float z[kItems];
      in.z.read(b, c, first, valid, z);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        y[i] *= fast_silu(z[i]);
      }
    }
    args.out.store(b, c, first, valid, y);
  }
}

// ---- backward ----

// One sum of the warp's steps, to a place that only its first lane adds to.
__device__ __forceinline__ void add_over_warp(float* place, float value, int lane, bool active) {
  const float sum = warp_sum(value);
  if (active && lane == 0) {
    *place += sum;
  }
}

constexpr int kVectors = kItems / 4 * kWarp;  // of four steps, in a tile

// A lane's values of a plane, in vectors of four; neighbouring lanes write neighbouring vectors.
__device__ __forceinline__ void put(float4* plane, const float (&values)[kItems], int lane) {
  plane[lane] = make_float4(values[0], values[1], values[2], values[3]);
  plane[kWarp + lane] = make_float4(values[4], values[5], values[6], values[7]);
}

// Either a plane each of a time-varying gradient, or its sum over time.
__device__ __forceinline__ void leave(bool constant, float* place, std::int64_t imaginary,
                                      float4 (*planes)[kVectors], const Complex (&gradient)[kItems],
                                      int lane, bool active) {
  float re[kItems], im[kItems];
  float sum_re = 0.0f, sum_im = 0.0f;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    re[i] = gradient[i].re;
    im[i] = gradient[i].im;
    sum_re += re[i];
    sum_im += im[i];
  }
  if (constant) {
    add_over_warp(place, sum_re, lane, active);
    add_over_warp(place + imaginary, sum_im, lane, active);
  } else {
    put(planes[0], re, lane);
    put(planes[1], im, lane);
  }
}

//   grid    (b, group, block of kComplexWarps channels of the group), one dimension
//   CTA     warp = one channel, lane = kItems steps of a tile of kCheckpointInterval steps
//   shared  each warp's dB and dC of one state and tile
// Tiles run from the last of a segment to its first, each from the checkpoint that entered it. A
// CTA sums dB and dC of its channels and leaves them where no other CTA does.
__global__ void __launch_bounds__(kThreads, 2)
    scan_complex_backward(const ComplexBackwardArgs args) {
  constexpr int kPlanes = 4;  // real and imaginary part of dB, then of dC
  __shared__ float4 exchange[kComplexWarps][kPlanes][kVectors];

  const ComplexInputs& in = args.in;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int blocks = (in.channels_per_group + kComplexWarps - 1) / kComplexWarps;
  const int block = static_cast<int>(blockIdx.x) % blocks;
  const int group = static_cast<int>(blockIdx.x) / blocks % in.groups;
  const int b = static_cast<int>(blockIdx.x) / blocks / in.groups;
  const int in_group = block * kComplexWarps + warp;
  // A warp beyond the group's end keeps up with the barriers and contributes zeros.
  const bool active = in_group < in.channels_per_group;
  const int c = group * in.channels_per_group + (active ? in_group : 0);
  const bool constant_B = in.B.varying == nullptr, constant_C = in.C.varying == nullptr;

  // Places in (B, D, N), and how many there are: what lies between the two planes of such an array.
  const std::int64_t own_channel = static_cast<std::int64_t>(b) * in.channels + c;
  const std::int64_t own = own_channel * in.d_state;
  const std::int64_t batch = gridDim.x / blocks / in.groups;
  const std::int64_t all_states = batch * in.channels * in.d_state;
  // The same of (blocks, B, G, N, steps).
  const std::int64_t steps =
      static_cast<std::int64_t>(args.parts.last_tile - args.parts.first_tile) * kCheckpointInterval;
  const std::int64_t rows = batch * in.groups * in.d_state;
  const std::int64_t first_row =
      block * rows + (static_cast<std::int64_t>(b) * in.groups + group) * in.d_state;
  const std::int64_t all_steps = blocks * rows * steps;

  const float bias = in.delta_bias.get(0, c, 0);
  const float skip = in.D.get(0, c, 0);
  float sum_dD = 0.0f, sum_dbias = 0.0f;

  for (int tile = args.parts.last_tile - 1; tile >= args.parts.first_tile; --tile) {
    const std::int64_t first =
        static_cast<std::int64_t>(tile) * kCheckpointInterval + lane * kItems;
    const int valid = active ? valid_items(in.length, first) : 0;
    float delta[kItems], x[kItems], g[kItems];  // g: dL/dy, twice
    float elapsed = 0.0f;                       // sum of delta over the lane's steps
    in.delta.read(b, c, first, valid, delta);
    in.u.read(b, c, first, valid, x);
    args.dout.read(b, c, first, valid, g);
    discretise(delta, bias, in.delta_softplus, valid);
    if (in.z.data != nullptr) {
      float z[kItems];
      in.z.read(b, c, first, valid, z);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        g[i] *= fast_silu(z[i]);
      }
    }
    const Cuts cuts = cuts_of(in.sequences, b, first, lane, active);
    float sum_qb[kItems], sum_qaw[kItems], y[kItems];  // over the states; y: half of Re(C h)
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      sum_dD = fmaf(g[i], x[i], sum_dD);
      x[i] *= delta[i];
      g[i] *= 2.0f;
      elapsed += delta[i];
      sum_qb[i] = sum_qaw[i] = y[i] = 0.0f;
    }

#pragma unroll 1
    for (int n = 0; n < in.d_state; ++n) {
      const Complex A = in.A.get(0, c, n);
      const Rate rate(A);
      const float* const checkpoint =
          args.checkpoints + 2 * (checkpoint_offset(in, b, c, tile) + n);
      const Complex tile_state = active ? Complex{checkpoint[0], checkpoint[1]} : Complex{};
      // The first lane stored what the tile after this one left.
      float* const adjoint = args.parts.adjoint + 2 * (own + n);
      Complex tile_adjoint;
      if (active && lane == 0) {
        tile_adjoint = tile + 1 == in.tiles
                           ? args.dlast_state.get(in.sequences.leaving(b, in.length - 1), c, n)
                           : Complex{adjoint[0], adjoint[1]};
      }
      tile_adjoint = from_lane(tile_adjoint, 0);

      Complex b_values[kItems], c_values[kItems], decay[kItems];
      in.B.read(b, group, c, n, first, valid, b_values);
      in.C.read(b, group, c, n, first, valid, c_values);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        decay[i] = rate.decay(delta[i]);
      }
      Complex h_span = rate.decay(elapsed);
      Complex q_span = conj(h_span);
      Complex h = args.state_before(cuts, b, c, n, first, 0, Complex{});
      h = fma(decay[0], h, x[0] * b_values[0]);
      Complex q = args.adjoint_after(cuts, b, c, n, first, kItems - 1, Complex{});
      q = fma(g[kItems - 1], conj(c_values[kItems - 1]), q);
#pragma unroll
      for (int i = 1; i < kItems; ++i) {
        const int j = kItems - 1 - i;
        h = args.state_before(cuts, b, c, n, first, i, h);
        h = fma(decay[i], h, x[i] * b_values[i]);
        q = args.adjoint_after(cuts, b, c, n, first, j, conj(decay[j + 1]) * q);
        q = fma(g[j], conj(c_values[j]), q);
      }
      q = conj(decay[0]) * q;  // what a lane hands to the lane before it
#pragma unroll
      for (int offset = 1; offset < kWarp; offset *= 2) {
        const Complex h_before = from_before(h, offset);
        const Complex h_span_before = from_before(h_span, offset);
        const Complex q_after = from_after(q, offset);
        const Complex q_span_after = from_after(q_span, offset);
        if (offset <= cuts.before) {
          h = fma(h_span, h_before, h);
          h_span = h_span * h_span_before;
        }
        if (offset <= cuts.after) {
          q = fma(q_span, q_after, q);
          q_span = q_span * q_span_after;
        }
      }
      h = from_before(cuts.from_start ? fma(h_span, tile_state, h) : h, 1);
      h = lane == 0 ? tile_state : h;
      const Complex handed = cuts.to_end ? fma(q_span, tile_adjoint, q) : q;
      q = from_after(handed, 1);
      q = lane == kWarp - 1 ? tile_adjoint : q;
      if (active && lane == 0) {
        adjoint[0] = handed.re;
        adjoint[1] = handed.im;
        if (tile == 0) {
          args.dinitial_state.set(in.sequences.entering(b, 0), c, n, handed);
        }
      }

      Complex w[kItems], gradient[kItems];
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        w[i] = decay[i] * args.state_before(cuts, b, c, n, first, i, h);
        h = fma(x[i], b_values[i], w[i]);
        gradient[i] = g[i] * conj(h);
        y[i] += dot(c_values[i], conj(h));
      }
      leave(constant_C, args.parts.dC + own + n, all_states, &exchange[warp][2], gradient, lane,
            active);
      Complex dA;
#pragma unroll
      for (int i = kItems - 1; i >= 0; --i) {
        const Complex later = i == kItems - 1 ? q : conj(decay[i + 1]) * q;
        q = args.adjoint_after(cuts, b, c, n, first, i, later);
        q = fma(g[i], conj(c_values[i]), q);
        if ((cuts.begins >> i & 1u) != 0u) {
          const int to = in.sequences.entering(b, first + i);
          args.dinitial_state.set(to, c, n, conj(decay[i]) * q);
        }
        const Complex qw = q * conj(w[i]);
        sum_qb[i] += dot(q, b_values[i]);
        sum_qaw[i] += dot(qw, A);
        dA = fma(delta[i], qw, dA);
        gradient[i] = x[i] * q;
      }
      leave(constant_B, args.parts.dB + own + n, all_states, &exchange[warp][0], gradient, lane,
            active);
      add_over_warp(args.parts.dA + own + n, dA.re, lane, active);
      add_over_warp(args.parts.dA + all_states + own + n, dA.im, lane, active);

      if (constant_B && constant_C) {
        continue;
      }
      __syncthreads();
      for (int v = static_cast<int>(threadIdx.x); v < kPlanes * kVectors; v += kThreads) {
        const int plane = v / kVectors;
        const bool is_c = plane >= 2;
        if (is_c ? constant_C : constant_B) {
          continue;
        }
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int k = 0; k < kComplexWarps; ++k) {
          const float4 part = exchange[k][plane][v % kVectors];
          sum[0] += part.x;
          sum[1] += part.y;
          sum[2] += part.z;
          sum[3] += part.w;
        }
        // v % kVectors = (steps 0-3 or 4-7 of a lane, lane)
        const int step = v % kWarp * kItems + v % kVectors / kWarp * 4;
        float* const to = (is_c ? args.parts.dC : args.parts.dB) + plane % 2 * all_steps +
                          (first_row + n) * steps;
        store_vector<4>(to + (tile - args.parts.first_tile) * kCheckpointInterval + step, sum);
      }
      __syncthreads();
    }

    // The activations again: they come from the cache, and registers were short in between.
    const int row = recomputed(c);
    float u[kItems], raw_delta[kItems], out[kItems];
    in.u.read(b, row, first, valid, u);
    in.delta.read(b, row, first, valid, raw_delta);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      out[i] = fmaf(sum_qb[i], delta[i], 0.5f * skip * g[i]);
    }
    args.du.store(b, row, first, valid, out);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const float value = raw_delta[i] + bias;
      const float slope =
          in.delta_softplus && value <= kSoftplusThreshold ? fast_sigmoid(value) : 1.0f;
      out[i] = i < valid ? fmaf(sum_qb[i], u[i], sum_qaw[i]) * slope : 0.0f;
      sum_dbias += out[i];
    }
    args.ddelta.store(b, row, first, valid, out);
    if (in.z.data != nullptr) {
      float z[kItems], dout[kItems];
      in.z.read(b, row, first, valid, z);
      args.dout.read(b, row, first, valid, dout);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        out[i] = dout[i] * fmaf(2.0f, y[i], skip * u[i]) * fast_silu_grad(z[i]);
      }
      args.dz.store(b, row, first, valid, out);
    }
  }
  add_over_warp(args.parts.dD + own_channel, sum_dD, lane, active);
  add_over_warp(args.parts.ddelta_bias + own_channel, sum_dbias, lane, active);
}

// ---- host ----

Steps steps_of(const TensorView& tensor) {
  Steps out;
  if (tensor.present()) {
    out.data = tensor.data;
    out.dtype = tensor.dtype;
    out.batch = tensor.stride[0];
    out.channel = tensor.stride[1];
    out.step = tensor.stride[2];
    out.vectorize = can_vectorize(tensor);
  }
  return out;
}

template <class Float>
States<Float> states_of(const TensorView& tensor) {
  States<Float> out;
  if (tensor.present()) {
    const bool has_rows = tensor.dim == 4;
    out.data = static_cast<Float*>(tensor.data);
    out.batch = has_rows ? tensor.stride[0] : 0;
    out.channel = tensor.stride[tensor.dim - 3];
    out.state = tensor.stride[tensor.dim - 2];
    out.part = tensor.stride[tensor.dim - 1];
  }
  return out;
}

ComplexCoefficient complex_coefficient(const TensorView& tensor) {
  ComplexCoefficient out;
  if (!is_varying(tensor)) {
    out.constant = states_of<const float>(tensor);
    return out;
  }
  out.varying = tensor.data;
  out.dtype = tensor.dtype;
  out.batch = tensor.stride[0];
  out.group = tensor.stride[1];
  out.state = tensor.stride[2];
  out.step = tensor.stride[3];
  out.part = tensor.stride[4];
  // Numbers beside each other are as good as twice the steps.
  TensorView flat = tensor;
  flat.dim = 4;
  flat.size[3] = 2 * tensor.size[3];
  flat.stride[3] = 1;
  if (out.step < 0) {
    flat.data = static_cast<char*>(tensor.data) + (kItems - 1) * out.step * size_of(tensor.dtype);
  }
  out.vectorize = out.part == 1 && (out.step == 2 || out.step == -2) && can_vectorize(flat);
  return out;
}

ComplexInputs complex_inputs(const Inputs& in, const Problem& problem) {
  ComplexInputs out;
  out.channels = count(problem.channels);
  out.channels_per_group = count(problem.channels_per_group());
  out.groups = count(problem.groups);
  out.d_state = count(in.A.size[1]);
  out.tiles = count(problem.tiles());
  out.length = problem.length;
  out.u = steps_of(in.u);
  out.delta = steps_of(in.delta);
  out.z = steps_of(in.z);
  out.A = states_of<const float>(in.A);
  out.initial_state = states_of<const float>(in.initial_state);
  out.B = complex_coefficient(in.B);
  out.C = complex_coefficient(in.C);
  out.D = weights<const float>(in.D);
  out.delta_bias = weights<const float>(in.delta_bias);
  out.sequences = device_sequences<Scope::packed>(in);
  out.delta_softplus = in.delta_softplus;
  return out;
}

// A segment of tiles; params are in the order of the scan.
struct ComplexSegment {
  const BackwardParams& params;
  const Problem& problem;

  void operator()(const Parts& parts) const {
    ComplexBackwardArgs args;
    args.in = complex_inputs(params.in, problem);
    args.dout = steps_of(params.dout);
    args.du = steps_of(params.du);
    args.ddelta = steps_of(params.ddelta);
    args.dz = steps_of(params.dz);
    args.dlast_state = states_of<const float>(params.dlast_state);
    args.dinitial_state = states_of<float>(params.dinitial_state);
    args.checkpoints = params.checkpoints.as<const float>();
    args.parts = parts;
    const std::int64_t blocks =
        problem.groups * ceil_div(problem.channels_per_group(), kComplexWarps);
    scan_complex_backward<<<static_cast<unsigned>(count(problem.batch * blocks)), kThreads, 0,
                            static_cast<cudaStream_t>(params.stream)>>>(args);
    MAMBA_CUDA_CHECK_LAUNCH();
  }
};

}  // namespace

void forward_complex(const ForwardParams& given) {
  const ForwardParams params = in_scan_order(given);
  const Problem problem = problem_of(params.in);
  ComplexForwardArgs args;
  args.in = complex_inputs(params.in, problem);
  args.out = steps_of(params.out);
  args.last_state = states_of<float>(params.last_state);
  args.checkpoints = params.checkpoints.as<float>();
  const std::int64_t blocks = ceil_div(problem.channels, kComplexWarps);
  scan_complex<<<static_cast<unsigned>(count(problem.batch * blocks)), kThreads, 0,
                 static_cast<cudaStream_t>(params.stream)>>>(args);
  MAMBA_CUDA_CHECK_LAUNCH();
}

void backward_complex(const BackwardParams& given) {
  const BackwardParams params = in_scan_order(given);
  const Problem problem = problem_of(params);
  launch_ordered(ComplexSegment{params, problem}, params, problem, kComplexBackward);
}

}  // namespace mamba_native::selective_scan::cuda
