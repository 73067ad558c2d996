// Backward kernel and its host launcher. With g[t] = dout[t] silu(z[t]) (dout without z), the
// adjoint state q[t] = C[n,t] g[t] + exp(delta[t+1] A) q[t+1] runs backward in time, and with
// w[t] = exp(delta[t] A) h[t-1]:
//   du = D g + delta sum_n q B          ddelta = (u sum_n q B + sum_n q A w) softplus'
//   dz = dout y silu'(z)                dA = sum_bt q delta w
//   dB = sum_d q delta u                dC = sum_d g h
//   dD = sum_bt g u                     ddelta_bias = sum_bt ddelta
// The README of this room derives this and says where the time goes.
#pragma once

#include <algorithm>
#include <utility>

#include "core/cuda/launch.h"
#include "selective_scan/plan.h"
#include "selective_scan/scan_order.h"
#include "selective_scan/sums.h"
#include "selective_scan/tensors.cuh"

namespace mamba_native::selective_scan::cuda {

using mamba_native::cuda::atomic_add4;
using mamba_native::cuda::warp_sum;

// dB or dC: contiguous (B, G, N, L) but for the direction of time, or (D, N) for a constant
// coefficient.
struct CoefficientGradient {
  float* data;
  int step;  // 1, or -1 in a reverse scan
  bool constant;
  bool vectorize;  // rows are 16-byte aligned
};

// Deterministic sums: every channel of a batch entry has a place for what it adds to dA, dD,
// ddelta_bias and static dB, dC, which one thread updates tile by tile, and every CTA one for its
// part of a tile of varying dB, dC. A launch goes through the tiles of a segment, so that the parts
// of all CTAs stay small; the adjoint crosses from one launch to the next.
struct Parts {
  float* dA = nullptr;                 // (B, D, N); null: atomics instead, and one segment
  float *dB = nullptr, *dC = nullptr;  // static: (B, D, N); varying: (blocks, B, G, N, steps)
  float *dD = nullptr, *ddelta_bias = nullptr;  // (B, D)
  float* adjoint = nullptr;                     // (B, D, N)
  int first_tile = 0, last_tile = 0;
};

template <class T, Scope SCOPE>
struct BackwardArgs {
  DeviceInputs<T, SCOPE> in;
  Sequence<const T, SCOPE> dout;
  Weights<const float> dlast_state;
  const float* checkpoints;  // (B, D, tiles, N), contiguous
  Sequence<T, SCOPE> du, ddelta, dz;
  Weights<float> dA, dD, ddelta_bias, dinitial_state;
  CoefficientGradient dB, dC;
  Parts parts;

  __device__ __forceinline__ bool ordered() const {
    return SCOPE != Scope::plain && parts.dA != nullptr;
  }
  // Where channel c of batch entry b has its place in an array of (B, D, size).
  __device__ __forceinline__ std::int64_t place(int b, int c, int size) const {
    return (static_cast<std::int64_t>(b) * in.channels + c) * size;
  }
  // Adds to what many CTAs share, or to a place of the channel's own.
  __device__ __forceinline__ void add(float* shared, float* own, std::int64_t place,
                                      float value) const {
    if (ordered()) {
      own[place] += value;
    } else {
      atomicAdd(shared, value);
    }
  }
  // Where the steps from `first` on begin or end sequences that have states of their own: those
  // states, and the adjoints of their last ones.
  __device__ __forceinline__ void own_states(const Cuts& cuts, int b, int c, int n,
                                             std::int64_t first, float (&start)[kItems],
                                             float (&end)[kItems]) const {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      start[i] = end[i] = 0.0f;
      if ((cuts.begins >> i & 1u) != 0u) {
        start[i] = state_of(in.initial_state, in.sequences.entering(b, first + i), c, n);
      }
      if ((cuts.ends >> i & 1u) != 0u) {
        end[i] = state_of(dlast_state, in.sequences.leaving(b, first + i), c, n);
      }
    }
  }
  // Stores the adjoint of the state that step first + i begins from, if it begins a sequence.
  __device__ __forceinline__ void leave_adjoint(const Cuts& cuts, int b, int c, int n,
                                                std::int64_t first, int i, float q) const {
    if ((cuts.begins >> i & 1u) != 0u && dinitial_state.data != nullptr) {
      const int to = in.sequences.entering(b, first + i);
      if (to >= 0) {
        dinitial_state.at(to, c, n) = q;
      }
    }
  }
};

// A constant coefficient belongs to one channel, and its gradient sums over time: over the warp.
template <class Args>
__device__ __forceinline__ void add_over_time(const Args& args, const CoefficientGradient& to,
                                              float* own, const float (&values)[kItems], int b,
                                              int c, int n, int lane, bool active) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    sum += values[i];
  }
  sum = warp_sum(sum);
  if (active && lane == 0) {
    args.add(to.data + static_cast<std::int64_t>(c) * args.in.d_state + n, own,
             args.place(b, c, args.in.d_state) + n, sum);
  }
}

// One lane's kItems values into an exchange buffer: four and four, so that neighbouring lanes write
// neighbouring vectors.
__device__ __forceinline__ void exchange_put(float* to, const float (&values)[kItems]) {
  *reinterpret_cast<float4*>(to) = make_float4(values[0], values[1], values[2], values[3]);
  *reinterpret_cast<float4*>(to + 4 * kWarp) =
      make_float4(values[4], values[5], values[6], values[7]);
}

// CTAs that the register budget keeps on one multiprocessor. Before Hopper, ptxas spills where it
// must fit eight warps into 128 registers each.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int resident_blocks(int warps, int blocks) { return warps == 8 ? 1 : blocks; }
#else
constexpr int resident_blocks(int, int blocks) { return blocks; }
#endif

// Lanes over time, any d_state.
//   grid    (b, group, block of WARPS channels of the group), one dimension
//   CTA     warp = one channel, lane = kItems steps of a tile of kCheckpointInterval steps
//   shared  per warp: two exchange buffers for dB and dC (kItems of each per lane), a staging area
//           for dA of kBackwardStage states, the adjoint carry of every state
// Tiles run from the last to the first, each from the checkpoint that entered it. For every state:
// decays once, then the forward and the adjoint recurrence together (local run, one scan over the
// warp for both directions, second run), and the channel's share of dB and dC goes through shared
// memory, where the CTA sums its channels before one atomic per 4 steps.
template <class T, Scope SCOPE, int WARPS, int BLOCKS>
__global__ void __launch_bounds__(WARPS* kWarp, resident_blocks(WARPS, BLOCKS))
    scan_backward(const BackwardArgs<T, SCOPE> args) {
  constexpr int kThreads = WARPS * kWarp;
  constexpr int kExchange = 2 * kItems * kWarp;  // floats per warp and buffer: dB and dC
  constexpr int kStageStride = kWarp + 1;        // so that columns fall into different banks
  extern __shared__ float4 shared_memory[];

  const DeviceInputs<T, SCOPE>& in = args.in;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  float* const exchange = reinterpret_cast<float*>(shared_memory);
  float* const stage = exchange + 2 * WARPS * kExchange + warp * kBackwardStage * kStageStride;
  float* const carries =
      exchange + WARPS * (2 * kExchange + kBackwardStage * kStageStride) + warp * in.d_state;

  const int blocks = (in.channels_per_group + WARPS - 1) / WARPS;
  const int in_group = static_cast<int>(blockIdx.x) % blocks * WARPS + warp;
  const int group = static_cast<int>(blockIdx.x) / blocks % in.groups;
  const int b = static_cast<int>(blockIdx.x) / blocks / in.groups;
  // A warp beyond the group's end keeps up with the barriers and contributes zeros.
  const bool active = in_group < in.channels_per_group;
  const int c = group * in.channels_per_group + (active ? in_group : 0);
  const bool exchanges = !(args.dB.constant && args.dC.constant);

  const CoefficientRows<T, SCOPE> rows_b(in.B, b, group, c);
  const CoefficientRows<T, SCOPE> rows_c(in.C, b, group, c);
  const std::int64_t first_row = (static_cast<std::int64_t>(b) * in.groups + group) * in.d_state;
  float sum_dD = 0.0f, sum_dbias = 0.0f;
  int buffer = 0;

  const int first_tile = SCOPE != Scope::plain ? args.parts.first_tile : 0;
  const int last_tile = SCOPE != Scope::plain ? args.parts.last_tile : in.tiles;
  for (int tile = last_tile - 1; tile >= first_tile; --tile) {
    const std::int64_t t0 = static_cast<std::int64_t>(tile) * kCheckpointInterval;
    const std::int64_t first = t0 + lane * kItems;
    const int valid = active ? valid_items(in.length, first) : 0;
    float delta[kItems], x[kItems], g[kItems];
    float elapsed = 0.0f;  // sum of delta over the lane's steps
    in.delta.read(b, c, first, valid, delta);
    in.u.read(b, c, first, valid, x);
    args.dout.read(b, c, first, valid, g);
    discretise(delta, in.delta_bias.get(0, c, 0), in.delta_softplus, valid);
    if (in.z.data != nullptr) {
      float z[kItems];
      in.z.read(b, c, first, valid, z);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        g[i] *= fast_silu(z[i]);
      }
    }
    const Cuts cuts = cuts_of(in.sequences, b, first, lane, active);
    float sum_qb[kItems], sum_qaw[kItems], y[kItems];  // over the states
    float own_start[kItems], own_end[kItems];          // see own_states
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      own_start[i] = own_end[i] = 0.0f;
      sum_dD = fmaf(g[i], x[i], sum_dD);
      x[i] *= delta[i];
      elapsed += delta[i];
      sum_qb[i] = sum_qaw[i] = y[i] = 0.0f;
    }

    for (int n0 = 0; n0 < in.d_state; n0 += kWarp) {
      // Lane l holds what belongs to state n0 + l.
      const int states = min(kWarp, in.d_state - n0);
      float rates = 0.0f, entering_states = 0.0f, carry = 0.0f;
      if (active && lane < states) {
        rates = in.A.at(0, c, n0 + lane);
        entering_states = args.checkpoints[checkpoint_offset(in, b, c, tile) + n0 + lane];
        if (tile + 1 == in.tiles) {
          carry = state_of(args.dlast_state, in.sequences.leaving(b, in.length - 1), c, n0 + lane);
        } else if (tile + 1 == last_tile) {
          carry = args.parts.adjoint[args.place(b, c, in.d_state) + n0 + lane];
        } else {
          carry = carries[n0 + lane];
        }
      }

#pragma unroll 1
      for (int j = 0; j < states; ++j) {
        const int n = n0 + j;
        float b_values[kItems], c_values[kItems];
        rows_b.values(rows_b.load(n, first, valid), n, true, b_values);
        rows_c.values(rows_c.load(n, first, valid), n, true, c_values);
        const float rate = __shfl_sync(kAllLanes, rates, j);
        const float tile_state = __shfl_sync(kAllLanes, entering_states, j);
        const float tile_adjoint = __shfl_sync(kAllLanes, carry, j);

        float decay[kItems];
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          decay[i] = exp2_approx(delta[i] * (rate * kLog2E));
        }
        float h_span = exp2_approx(elapsed * (rate * kLog2E));
        float q_span = h_span;
        float h = x[0] * b_values[0];
        float q = g[kItems - 1] * c_values[kItems - 1];
        if (in.sequences.present()) {
          if (cuts.numbered) {
            args.own_states(cuts, b, c, n, first, own_start, own_end);
          }
          h = fmaf(decay[0], own_start[0], h);
          q += own_end[kItems - 1];
        }
#pragma unroll
        for (int i = 1; i < kItems; ++i) {
          const int j = kItems - 1 - i;
          if (in.sequences.present()) {
            h = fmaf(decay[i], cuts.before_step(i, h, own_start[i]), x[i] * b_values[i]);
            q = fmaf(g[j], c_values[j], cuts.after_step(j, decay[j + 1] * q, own_end[j]));
          } else {
            h = fmaf(decay[i], h, x[i] * b_values[i]);
            q = fmaf(decay[j + 1], q, g[j] * c_values[j]);
          }
        }
        q *= decay[0];  // what a lane hands to the lane before it
#pragma unroll
        for (int offset = 1; offset < kWarp; offset *= 2) {
          const float h_before = __shfl_up_sync(kAllLanes, h, offset);
          const float h_span_before = __shfl_up_sync(kAllLanes, h_span, offset);
          const float q_after = __shfl_down_sync(kAllLanes, q, offset);
          const float q_span_after = __shfl_down_sync(kAllLanes, q_span, offset);
          if (offset <= cuts.before) {
            h = fmaf(h_span, h_before, h);
            h_span *= h_span_before;
          }
          if (offset <= cuts.after) {
            q = fmaf(q_span, q_after, q);
            q_span *= q_span_after;
          }
        }
        h = __shfl_up_sync(kAllLanes, cuts.from_start ? fmaf(h_span, tile_state, h) : h, 1);
        h = lane == 0 ? tile_state : h;
        const float handed = cuts.to_end ? fmaf(q_span, tile_adjoint, q) : q;
        q = __shfl_down_sync(kAllLanes, handed, 1);
        q = lane == kWarp - 1 ? tile_adjoint : q;
        const float tile_start = __shfl_sync(kAllLanes, handed, 0);
        carry = lane == j ? tile_start : carry;

        // Two exchange buffers: whoever still sums this one's last use has yet to arrive at the
        // barrier of the other's.
        float* const mine = exchange + (buffer * WARPS + warp) * kExchange + lane * 4;
        float w[kItems], gradient[kItems];
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          w[i] = decay[i] * (in.sequences.present() ? cuts.before_step(i, h, own_start[i]) : h);
          h = fmaf(x[i], b_values[i], w[i]);
          gradient[i] = g[i] * h;
          y[i] = fmaf(c_values[i], h, y[i]);
        }
        if (args.dC.constant) {
          add_over_time(args, args.dC, args.parts.dC, gradient, b, c, n, lane, active);
        } else {
          exchange_put(mine + kExchange / 2, gradient);
        }
        float dA = 0.0f;
#pragma unroll
        for (int i = kItems - 1; i >= 0; --i) {
          if (in.sequences.present()) {
            q = fmaf(g[i], c_values[i],
                     cuts.after_step(i, i == kItems - 1 ? q : decay[i + 1] * q, own_end[i]));
            if (cuts.numbered) {
              args.leave_adjoint(cuts, b, c, n, first, i, decay[i] * q);
            }
          } else {
            q = i == kItems - 1 ? fmaf(g[i], c_values[i], q)
                                : fmaf(decay[i + 1], q, g[i] * c_values[i]);
          }
          const float qw = q * w[i];
          sum_qb[i] = fmaf(q, b_values[i], sum_qb[i]);
          sum_qaw[i] = fmaf(rate, qw, sum_qaw[i]);
          dA = fmaf(delta[i], qw, dA);
          gradient[i] = q * x[i];
        }

        if (args.dB.constant) {
          add_over_time(args, args.dB, args.parts.dB, gradient, b, c, n, lane, active);
        } else {
          exchange_put(mine, gradient);
        }

        // dA: stage one value per lane and state; every kBackwardStage states, four lanes sum one
        // state's 32 values.
        stage[j % kBackwardStage * kStageStride + lane] = dA;
        if (j % kBackwardStage == kBackwardStage - 1 || j == states - 1) {
          __syncwarp();
          const int slot = lane % kBackwardStage;
          const float* const from = stage + slot * kStageStride + lane / kBackwardStage * 8;
          float sum = 0.0f;
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            sum += from[i];
          }
          sum += __shfl_xor_sync(kAllLanes, sum, 8);
          sum += __shfl_xor_sync(kAllLanes, sum, 16);
          if (active && lane <= j % kBackwardStage) {
            const int of = n - j % kBackwardStage + slot;
            args.add(&args.dA.at(0, c, of), args.parts.dA, args.place(b, c, in.d_state) + of, sum);
          }
          __syncwarp();
        }

        if (exchanges) {
          __syncthreads();
          const float* const all = exchange + buffer * WARPS * kExchange;
          // Half the warps suffice; they take turns.
          constexpr int kSums = kExchange / 4;
          const int turn = static_cast<int>(threadIdx.x + buffer * (kThreads / 2)) % kThreads;
          for (int v = turn; v < kSums; v += kThreads) {
            const bool is_c = v >= kSums / 2;
            const CoefficientGradient& to = is_c ? args.dC : args.dB;
            if (to.constant) {
              continue;
            }
            float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int k = 0; k < WARPS; ++k) {
              const float4 part = *reinterpret_cast<const float4*>(all + k * kExchange + v * 4);
              sum[0] += part.x;
              sum[1] += part.y;
              sum[2] += part.z;
              sum[3] += part.w;
            }
            // v = (dB or dC, steps 0-3 or 4-7 of a lane, lane)
            const std::int64_t t = t0 + v % kWarp * kItems + v / kWarp % 2 * 4;
            if (args.ordered()) {
              // Offsets are computed here each time: over the loop they would take registers.
              const int tiles = recomputed(last_tile - first_tile);
              const int ctas = recomputed(static_cast<int>(gridDim.x)) / blocks;
              const std::int64_t rows = static_cast<std::int64_t>(ctas) * in.d_state;
              const std::int64_t block = recomputed(static_cast<int>(blockIdx.x)) % blocks;
              store_vector<4>((is_c ? args.parts.dC : args.parts.dB) +
                                  ((block * rows + first_row + n) * tiles - first_tile) *
                                      static_cast<std::int64_t>(kCheckpointInterval) +
                                  t,
                              sum);
              continue;
            }
            const int step = SCOPE != Scope::plain ? to.step : 1;
            float* const at = to.data + (first_row + n) * in.length + t * step;
            if (to.vectorize && t < in.length) {
              if (step > 0) {
                atomic_add4(at, sum[0], sum[1], sum[2], sum[3]);
              } else {
                atomic_add4(at - 3, sum[3], sum[2], sum[1], sum[0]);
              }
            } else {
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                if (t + i < in.length) {
                  atomicAdd(at + i * step, sum[i]);
                }
              }
            }
          }
          buffer ^= 1;
        }
      }
      if (lane < states) {
        carries[n0 + lane] = carry;
        if (args.ordered() && tile == first_tile && active) {
          args.parts.adjoint[args.place(b, c, in.d_state) + n0 + lane] = carry;
        }
        if (tile == 0 && active && args.dinitial_state.data != nullptr) {
          const int to = in.sequences.entering(b, 0);
          if (to >= 0) {
            args.dinitial_state.at(to, c, n0 + lane) = carry;
          }
        }
      }
    }

    // The activations again: they come from the cache, and registers were short in between.
    const int row = recomputed(c);
    const std::int64_t start =
        static_cast<std::int64_t>(recomputed(tile)) * kCheckpointInterval + lane * kItems;
    const int exist = active ? valid_items(in.length, start) : 0;
    const float bias = in.delta_bias.get(0, row, 0);
    const float skip = in.D.get(0, row, 0);
    float u[kItems], raw_delta[kItems], out[kItems];
    in.u.read(b, row, start, exist, u);
    in.delta.read(b, row, start, exist, raw_delta);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      out[i] = fmaf(sum_qb[i], delta[i], skip * g[i]);
    }
    args.du.store(b, row, start, exist, out);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const float value = raw_delta[i] + bias;
      const float slope =
          in.delta_softplus && value <= kSoftplusThreshold ? fast_sigmoid(value) : 1.0f;
      out[i] = i < exist ? fmaf(sum_qb[i], u[i], sum_qaw[i]) * slope : 0.0f;
      sum_dbias += out[i];
    }
    args.ddelta.store(b, row, start, exist, out);
    if (in.z.data != nullptr) {
      float z[kItems], dout[kItems];
      in.z.read(b, row, start, exist, z);
      args.dout.read(b, row, start, exist, dout);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        out[i] = dout[i] * fmaf(skip, u[i], y[i]) * fast_silu_grad(z[i]);
      }
      args.dz.store(b, row, start, exist, out);
    }
  }

  sum_dD = warp_sum(sum_dD);
  sum_dbias = warp_sum(sum_dbias);
  if (active && lane == 0) {
    if (args.dD.data != nullptr) {
      args.add(&args.dD.at(0, c, 0), args.parts.dD, args.place(b, c, 1), sum_dD);
    }
    if (args.ddelta_bias.data != nullptr) {
      args.add(&args.ddelta_bias.at(0, c, 0), args.parts.ddelta_bias, args.place(b, c, 1),
               sum_dbias);
    }
  }
}

inline CoefficientGradient coefficient_gradient(const TensorView& tensor, std::int64_t length) {
  CoefficientGradient out;
  out.data = tensor.as<float>();
  out.constant = tensor.dim == 2;
  out.step = !out.constant && tensor.stride[3] < 0 ? -1 : 1;
  const float* const lowest = out.step > 0 ? out.data : out.data - 3;
  out.vectorize = length % 4 == 0 && reinterpret_cast<std::uintptr_t>(lowest) % 16 == 0;
  return out;
}

// params are in the order of the scan, and the sums are cleared.
template <class T, std::size_t I>
void launch_backward(const BackwardParams& params, const Problem& problem, const Parts& parts) {
  constexpr BackwardConfig kConfig = kBackwardConfigs[I];
  constexpr Scope kScope = kConfig.scope;
  BackwardArgs<T, kScope> args;
  args.in = device_inputs<T, kScope>(params.in, problem.groups);
  args.dout = sequence<const T, kScope>(params.dout);
  args.dlast_state = weights<const float>(params.dlast_state);
  args.checkpoints = params.checkpoints.as<const float>();
  args.du = sequence<T, kScope>(params.du);
  args.ddelta = sequence<T, kScope>(params.ddelta);
  args.dz = sequence<T, kScope>(params.dz);
  args.dA = weights<float>(params.dA);
  args.dD = weights<float>(params.dD);
  args.ddelta_bias = weights<float>(params.ddelta_bias);
  args.dinitial_state = weights<float>(params.dinitial_state);
  args.parts = parts;
  args.dB = coefficient_gradient(params.dB, problem.length);
  args.dC = coefficient_gradient(params.dC, problem.length);

  constexpr auto kKernel = &scan_backward<T, kScope, kConfig.warps, kConfig.blocks>;
  const int shared = static_cast<int>(backward_shared_memory(kConfig.warps, problem.d_state));
  mamba_native::cuda::allow_shared_memory(kKernel, shared);
  const std::int64_t blocks =
      problem.groups * ceil_div(problem.channels_per_group(), kConfig.warps);
  kKernel<<<static_cast<unsigned>(count(problem.batch * blocks)), kConfig.warps * kWarp, shared,
            static_cast<cudaStream_t>(params.stream)>>>(args);
  MAMBA_CUDA_CHECK_LAUNCH();
}

// The rows of kBackwardConfigs.
template <class T, std::size_t... I>
void launch_backward_row(int row, const BackwardParams& params, const Problem& problem,
                         const Parts& parts, std::index_sequence<I...>) {
  using Launch = void (*)(const BackwardParams&, const Problem&, const Parts&);
  static constexpr Launch kRows[] = {&launch_backward<T, I>...};
  kRows[row](params, problem, parts);
}

// launch_backward_row for a segment.
template <class T>
struct RowSegment {
  int row;
  const BackwardParams& params;
  const Problem& problem;

  void operator()(const Parts& parts) const {
    launch_backward_row<T>(row, params, problem, parts,
                           std::make_index_sequence<kBackwardConfigCount>());
  }
};

// Segment by segment, last one first, launch(parts), then the sums over the batch.
template <class Launch>
void launch_ordered(const Launch& launch, const BackwardParams& params, const Problem& problem,
                    const BackwardConfig& config) {
  const OrderedWorkspace workspace = ordered_workspace(problem, config);
  Parts parts;
  parts.dD = params.workspace.as<float>();
  parts.ddelta_bias = parts.dD + workspace.channel_sums;
  parts.dA = parts.ddelta_bias + workspace.channel_sums;
  parts.adjoint = parts.dA + workspace.state_sums;
  parts.dB = parts.adjoint + workspace.state_sums;
  parts.dC = parts.dB + (workspace.varying_B ? 0 : workspace.state_sums);
  MAMBA_CUDA_CHECK(cudaMemsetAsync(params.workspace.data, 0,
                                   static_cast<std::size_t>(workspace.fixed()) * sizeof(float),
                                   static_cast<cudaStream_t>(params.stream)));
  float* const varying = params.workspace.as<float>() + workspace.fixed();

  const int tiles = count(problem.tiles());
  const int segment =
      static_cast<int>(std::min<std::int64_t>(tiles, workspace.tiles(params.workspace.numel())));
  for (int last = tiles; last > 0; last = parts.first_tile) {
    parts.last_tile = last;
    parts.first_tile = last > segment ? last - segment : 0;
    const std::int64_t steps = (parts.last_tile - parts.first_tile) * kCheckpointInterval;
    const std::int64_t begin = parts.first_tile * kCheckpointInterval;
    const std::int64_t end = std::min(problem.length, begin + steps);
    if (workspace.varying_B) {
      parts.dB = varying;
    }
    if (workspace.varying_C) {
      parts.dC = varying + workspace.tile * (parts.last_tile - parts.first_tile);
    }
    launch(parts);
    if (workspace.varying_B) {
      sum_over_blocks(params.dB, parts.dB, workspace.blocks, steps, begin, end, params.stream);
    }
    if (workspace.varying_C) {
      sum_over_blocks(params.dC, parts.dC, workspace.blocks, steps, begin, end, params.stream);
    }
  }
  sum_over_batch(params.dA, parts.dA, problem.batch, params.stream);
  sum_over_batch(params.dD, parts.dD, problem.batch, params.stream);
  sum_over_batch(params.ddelta_bias, parts.ddelta_bias, problem.batch, params.stream);
  if (!workspace.varying_B) {
    sum_over_batch(params.dB, parts.dB, problem.batch, params.stream);
  }
  if (!workspace.varying_C) {
    sum_over_batch(params.dC, parts.dC, problem.batch, params.stream);
  }
}

template <class Host>
void backward(const BackwardParams& params) {
  using T = mamba_native::cuda::DeviceType<Host>;
  const Problem problem = problem_of(params);
  const int row = choose_backward(
      problem, mamba_native::cuda::device_info(params.in.u.device.index), params.config);
  if (params.deterministic) {
    const BackwardParams ordered = in_scan_order(params);
    launch_ordered(RowSegment<T>{row, ordered, problem}, ordered, problem, kBackwardConfigs[row]);
    return;
  }
  const TensorView sums[kCleared] = {params.dA, params.dB, params.dC, params.dD,
                                     params.ddelta_bias};
  clear(sums, params.stream);
  Parts none;
  none.last_tile = count(problem.tiles());
  launch_backward_row<T>(row, in_scan_order(params), problem, none,
                         std::make_index_sequence<kBackwardConfigCount>());
}

}  // namespace mamba_native::selective_scan::cuda
