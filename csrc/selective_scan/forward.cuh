// Forward kernels and their host launcher. For every batch b, channel d, state n:
//   h[t]   = exp(delta[t] A[d,n]) h[t-1] + delta[t] u[t] B[n,t]
//   out[t] = (sum_n C[n,t] h[t] + D[d] u[t]) silu(z[t])
// The README of this room says which kernel is for what and where its time goes.
#pragma once

#include <utility>

#include "core/cuda/launch.h"
#include "selective_scan/plan.h"
#include "selective_scan/scan_order.h"
#include "selective_scan/tensors.cuh"

namespace mamba_native::selective_scan::cuda {

template <class T, Scope SCOPE>
struct ForwardArgs {
  DeviceInputs<T, SCOPE> in;
  Sequence<T, SCOPE> out;
  Weights<float> last_state;
  float* checkpoints;  // (B, D, tiles, N), contiguous
};

// y becomes y silu(z) where there is a z.
template <class T, Scope SCOPE>
__device__ __forceinline__ void gate(const DeviceInputs<T, SCOPE>& in, const Items<T>& z,
                                     float (&y)[kItems]) {
  if (in.z.data != nullptr) {
    float values[kItems];
    z.floats(values, in.z.mirrored());
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      y[i] *= fast_silu(values[i]);
    }
  }
}

// Serial in time, for many channels and d_state <= kSerialStates.
//   grid    (b, group, block of kChannels channels of the group), one dimension
//   CTA     kChannels = kSerialThreads / LANES; LANES neighbouring threads share a channel and hold
//           kSerialStates / LANES of its states each, in registers
//   shared  a tile of TILE steps: delta and delta u of every channel, B and C of the group
// A tile has an elementwise phase (thread = kItems steps of a channel, coalesced), a scan phase
// (thread = its states of one channel, all steps) and an elementwise phase again that finishes and
// stores out. The next tile's loads fly during the scan phase.
inline constexpr int kSerialThreads = 128;

template <int LANES, int TILE>
struct SerialShape {
  static constexpr int kN = static_cast<int>(kSerialStates);
  static constexpr int kChannels = kSerialThreads / LANES;
  static constexpr int kRowVectors = TILE / kItems;
  // Elementwise phase: pass e moves row `row + e kRowsPerPass`, steps from `column` on.
  static constexpr int kRowsPerPass = kSerialThreads / kRowVectors;
  static constexpr int kPasses = kChannels / kRowsPerPass;
  // B, then C: vector v is state v % kN at steps from v / kN % kRowVectors * kItems on.
  static constexpr int kCoefficientVectors = kN * kRowVectors;
  static constexpr int kCoefficientPasses = 2 * kCoefficientVectors / kSerialThreads;
  static_assert(kPasses >= 1 && kCoefficientPasses >= 1, "every thread has a vector to move");
  static_assert(kCheckpointInterval % TILE == 0, "checkpoints fall on tile borders");
};

// One thread's part of the tile that is on its way from memory.
template <class T, Scope SCOPE, int LANES, int TILE>
struct SerialLoads {
  using Shape = SerialShape<LANES, TILE>;

  CoefficientRows<T, SCOPE> rows_b, rows_c;
  int b, first_channel, block_channels;
  int row, column;
  Items<T> u[Shape::kPasses], delta[Shape::kPasses];
  Items<T> coefficients[Shape::kCoefficientPasses];

  __device__ __forceinline__ int channel(int pass) const {
    return first_channel + recomputed(row) + pass * Shape::kRowsPerPass;
  }
  __device__ __forceinline__ int valid(const DeviceInputs<T, SCOPE>& in, int pass,
                                       std::int64_t t0) const {
    return row + pass * Shape::kRowsPerPass < block_channels ? valid_items(in.length, t0 + column)
                                                             : 0;
  }

  __device__ __forceinline__ void fetch(const DeviceInputs<T, SCOPE>& in, std::int64_t t0) {
#pragma unroll
    for (int e = 0; e < Shape::kPasses; ++e) {
      u[e] = in.u.load(b, channel(e), t0 + column, valid(in, e, t0));
      delta[e] = in.delta.load(b, channel(e), t0 + column, valid(in, e, t0));
    }
#pragma unroll
    for (int e = 0; e < Shape::kCoefficientPasses; ++e) {
      const int v = static_cast<int>(threadIdx.x) + e * kSerialThreads;
      const int n = v % Shape::kN;
      const std::int64_t first = t0 + v / Shape::kN % Shape::kRowVectors * kItems;
      const int valid = n < in.d_state ? valid_items(in.length, first) : 0;
      coefficients[e] = (v < Shape::kCoefficientVectors ? rows_b : rows_c).load(n, first, valid);
    }
  }
};

// The states of a thread, `states` of them from first_state on, at step t, which begins a sequence.
template <class T, Scope SCOPE, int STATES>
__device__ __forceinline__ void enter(const DeviceInputs<T, SCOPE>& in, int b, std::int64_t t,
                                      int channel, int first_state, int states,
                                      float (&h)[STATES]) {
  const int from = in.sequences.entering(b, t);
#pragma unroll
  for (int i = 0; i < STATES; ++i) {
    h[i] = i < states ? state_of(in.initial_state, from, channel, first_state + i) : 0.0f;
  }
}

// The same after step t, which ends one.
template <class T, Scope SCOPE, int STATES>
__device__ __forceinline__ void leave(const ForwardArgs<T, SCOPE>& args, int b, std::int64_t t,
                                      int channel, int first_state, int states,
                                      const float (&h)[STATES]) {
  const int to = args.in.sequences.leaving(b, t);
#pragma unroll
  for (int i = 0; i < STATES; ++i) {
    if (to >= 0 && i < states) {
      args.last_state.at(to, channel, first_state + i) = h[i];
    }
  }
}

template <class T, Scope SCOPE, int LANES, int TILE, int BLOCKS>
__global__ void __launch_bounds__(kSerialThreads, BLOCKS)
    scan_serial(const ForwardArgs<T, SCOPE> args) {
  using Shape = SerialShape<LANES, TILE>;
  constexpr int kN = Shape::kN;
  constexpr int kStates = kN / LANES;
  constexpr int kStride = TILE + 4;              // 16-byte rows, channels spread over the banks
  constexpr int kGroup = LANES < 4 ? 4 : LANES;  // steps between two sums over the lanes

  __shared__ __align__(16) float shared_delta[Shape::kChannels * kStride];  // then y, in place
  __shared__ __align__(16) float shared_x[Shape::kChannels * kStride];
  __shared__ __align__(16) float shared_b[TILE * kN];
  __shared__ __align__(16) float shared_c[TILE * kN];

  const DeviceInputs<T, SCOPE>& in = args.in;
  const int thread = static_cast<int>(threadIdx.x);
  const int blocks = (in.channels_per_group + Shape::kChannels - 1) / Shape::kChannels;
  const int block = static_cast<int>(blockIdx.x) % blocks * Shape::kChannels;
  const int group = static_cast<int>(blockIdx.x) / blocks % in.groups;
  const int b = static_cast<int>(blockIdx.x) / blocks / in.groups;
  const int first_channel = group * in.channels_per_group + block;
  const int block_channels = min(Shape::kChannels, in.channels_per_group - block);

  // Scan phase: states first_state, first_state + 1, ... of one channel.
  const int lane = thread % LANES;
  const int first_state = lane * kStates;
  const int channel = first_channel + thread / LANES;
  const bool channel_exists = thread / LANES < block_channels;
  float* const scan_delta = shared_delta + thread / LANES * kStride;
  const float* const scan_x = shared_x + thread / LANES * kStride;
  const int states = channel_exists ? min(kStates, in.d_state - first_state) : 0;
  float rate[kStates], h[kStates];
#pragma unroll
  for (int i = 0; i < kStates; ++i) {
    rate[i] = i < states ? in.A.at(0, channel, first_state + i) * kLog2E : 0.0f;
  }
  enter(in, b, 0, channel, first_state, states, h);

  // Elementwise phases.
  const int row = thread / Shape::kRowVectors;
  const int column = thread % Shape::kRowVectors * kItems;
  float bias[Shape::kPasses], skip[Shape::kPasses];
#pragma unroll
  for (int e = 0; e < Shape::kPasses; ++e) {
    const int r = row + e * Shape::kRowsPerPass;
    bias[e] = r < block_channels ? in.delta_bias.get(0, first_channel + r, 0) : 0.0f;
    skip[e] = r < block_channels ? in.D.get(0, first_channel + r, 0) : 0.0f;
  }
  SerialLoads<T, SCOPE, LANES, TILE> loads{CoefficientRows<T, SCOPE>(in.B, b, group, 0),
                                           CoefficientRows<T, SCOPE>(in.C, b, group, 0),
                                           b,
                                           first_channel,
                                           block_channels,
                                           row,
                                           column};
  loads.fetch(in, 0);

  for (std::int64_t t0 = 0; t0 < in.length; t0 += TILE) {
    Items<T> u[Shape::kPasses], z[Shape::kPasses];
#pragma unroll
    for (int e = 0; e < Shape::kPasses; ++e) {
      const int at = (row + e * Shape::kRowsPerPass) * kStride + column;
      float delta[kItems], x[kItems];
      u[e] = loads.u[e];
      u[e].floats(x, in.u.mirrored());
      loads.delta[e].floats(delta, in.delta.mirrored());
      discretise(delta, bias[e], in.delta_softplus, loads.valid(in, e, t0));
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        x[i] *= delta[i];
      }
      store_vector<kItems>(shared_delta + at, delta);
      store_vector<kItems>(shared_x + at, x);
    }
#pragma unroll
    for (int e = 0; e < Shape::kCoefficientPasses; ++e) {
      const int v = thread + e * kSerialThreads;
      const bool is_b = v < Shape::kCoefficientVectors;
      float* const to =
          (is_b ? shared_b : shared_c) + v / kN % Shape::kRowVectors * kItems * kN + v % kN;
      float values[kItems];
      loads.coefficients[e].floats(values, (is_b ? loads.rows_b : loads.rows_c).mirrored);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        to[i * kN] = values[i];
      }
    }
    __syncthreads();

    if (in.z.data != nullptr) {
#pragma unroll
      for (int e = 0; e < Shape::kPasses; ++e) {
        z[e] = in.z.load(b, loads.channel(e), t0 + column, loads.valid(in, e, t0));
      }
    }
    loads.fetch(in, t0 + TILE);
    if (t0 % kCheckpointInterval == 0 && channel_exists) {
      float* const to =
          args.checkpoints +
          checkpoint_offset(in, b, channel, static_cast<int>(t0 / kCheckpointInterval));
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        if (first_state + i < in.d_state) {
          to[first_state + i] = h[i];
        }
      }
    }

    const int steps = static_cast<int>(min(static_cast<std::int64_t>(TILE), in.length - t0));
    const unsigned begins = begins_of<TILE>(in.sequences, b, t0);
#pragma unroll 1
    for (int t = 0; t < steps; t += kGroup) {
      float y[kGroup];
#pragma unroll
      for (int q = 0; q < kGroup; q += 4) {
        float delta[4], x[4];
        load_vector<4>(scan_delta + t + q, delta);
        load_vector<4>(scan_x + t + q, x);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float b_values[kStates], c_values[kStates];
          load_vector<kStates>(shared_b + (t + q + j) * kN + first_state, b_values);
          load_vector<kStates>(shared_c + (t + q + j) * kN + first_state, c_values);
          if (in.sequences.present() && (begins >> (t + q + j) & 1u) != 0u) {
            const std::int64_t step = t0 + t + q + j;
            leave(args, b, step - 1, channel, first_state, states, h);
            enter(in, b, step, channel, first_state, states, h);
          }
          float sums[2] = {0.0f, 0.0f};  // two chains of half the length
#pragma unroll
          for (int i = 0; i < kStates; ++i) {
            h[i] = fmaf(exp2_approx(delta[j] * rate[i]), h[i], x[j] * b_values[i]);
            sums[i % 2] = fmaf(h[i], c_values[i], sums[i % 2]);
          }
          y[q + j] = sums[0] + sums[1];
        }
      }
      // Sum over the channel's lanes while dealing the steps out to them: each round halves the
      // steps that a lane still holds, so lane l ends with steps l, l + LANES, ...
      int held = kGroup;
#pragma unroll
      for (int stride = 1; stride < LANES; stride *= 2) {
        held /= 2;
        const bool upper = (lane & stride) != 0;
#pragma unroll
        for (int i = 0; i < held; ++i) {
          const float keep = upper ? y[2 * i + 1] : y[2 * i];
          const float send = upper ? y[2 * i] : y[2 * i + 1];
          y[i] = keep + __shfl_xor_sync(kAllLanes, send, stride);
        }
      }
      __syncwarp();  // every lane of the channel has read delta at these steps
#pragma unroll
      for (int i = 0; i < kGroup / LANES; ++i) {
        scan_delta[t + i * LANES + lane] = y[i];
      }
    }
    __syncthreads();

    // Reads what this same thread overwrites next, so the next tile needs no third barrier.
#pragma unroll
    for (int e = 0; e < Shape::kPasses; ++e) {
      float y[kItems], x[kItems];
      load_vector<kItems>(shared_delta + (row + e * Shape::kRowsPerPass) * kStride + column, y);
      u[e].floats(x, in.u.mirrored());
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        y[i] = fmaf(skip[e], x[i], y[i]);
      }
      gate(in, z[e], y);
      args.out.store(b, loads.channel(e), t0 + column, loads.valid(in, e, t0), y);
    }
  }

  leave(args, b, in.length - 1, channel, first_state, states, h);
}

// Lanes over time, for few channels and any d_state.
//   grid    (b, block of WARPS channels), one dimension
//   CTA     WARPS independent warps: warp = one channel, lane = kItems steps of a tile of
//           kCheckpointInterval steps; no shared memory, B and C meet in L1
// A tile keeps delta, delta u and y in registers and takes the states in turn, STATES at once:
// every lane runs its steps from a zero state, a scan over the warp joins the lanes (the decay over
// any stretch is exp(A sum delta), so only sums of delta are needed to start it), and every lane
// runs its steps again from the right state. Lane n % 32 remembers the state between tiles;
// checkpoints do so where d_state exceeds 32. Where a sequence begins, the scan is cut: no lane
// joins what lies before, and the step takes its sequence's own state.
template <class T, Scope SCOPE, int WARPS, int STATES, int BLOCKS>
__global__ void __launch_bounds__(WARPS* kWarp, BLOCKS)
    scan_lanes(const ForwardArgs<T, SCOPE> args) {
  const DeviceInputs<T, SCOPE>& in = args.in;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int blocks = (in.channels + WARPS - 1) / WARPS;
  const int b = static_cast<int>(blockIdx.x) / blocks;
  const int c =
      static_cast<int>(blockIdx.x) % blocks * WARPS + static_cast<int>(threadIdx.x) / kWarp;
  if (c >= in.channels) {
    return;  // a whole warp, and no barrier waits for it
  }

  const int group = c / in.channels_per_group;
  const CoefficientRows<T, SCOPE> rows_b(in.B, b, group, c);
  const CoefficientRows<T, SCOPE> rows_c(in.C, b, group, c);
  const float bias = in.delta_bias.get(0, c, 0);
  const float skip = in.D.get(0, c, 0);
  float* checkpoint = args.checkpoints + checkpoint_offset(in, b, c, 0);
  float rate = 0.0f, carry = 0.0f;  // of state n0 + lane

  int valid = valid_items(in.length, lane * kItems);
  Items<T> next_u = in.u.load(b, c, lane * kItems, valid);
  Items<T> next_delta = in.delta.load(b, c, lane * kItems, valid);
  for (std::int64_t t0 = 0; t0 < in.length; t0 += kCheckpointInterval) {
    const std::int64_t first = t0 + lane * kItems;
    Items<T> next_b[STATES], next_c[STATES];
#pragma unroll
    for (int s = 0; s < STATES; ++s) {
      next_b[s] = rows_b.load(s, first, s < in.d_state ? valid : 0);
      next_c[s] = rows_c.load(s, first, s < in.d_state ? valid : 0);
    }
    float delta[kItems], x[kItems], y[kItems];
    float elapsed = 0.0f;  // sum of delta over the lane's steps
    next_u.floats(x, in.u.mirrored());
    next_delta.floats(delta, in.delta.mirrored());
    discretise(delta, bias, in.delta_softplus, valid);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      y[i] = skip * x[i];
      x[i] *= delta[i];
      elapsed += delta[i];
    }
    const Cuts cuts = cuts_of(in.sequences, b, first, lane, true);
    Items<T> z;
    if (in.z.data != nullptr) {
      z = in.z.load(b, recomputed(c), first, valid);
    }
    const std::int64_t t1 = t0 + kCheckpointInterval;
    const int next_valid = valid_items(in.length, t1 + lane * kItems);
    next_u = in.u.load(b, recomputed(c), t1 + lane * kItems, next_valid);
    next_delta = in.delta.load(b, recomputed(c), t1 + lane * kItems, next_valid);

    for (int n0 = 0; n0 < in.d_state; n0 += kWarp) {
      const bool lane_has_state = n0 + lane < in.d_state;
      if (lane_has_state) {
        if (t0 == 0) {
          rate = in.A.at(0, c, n0 + lane) * kLog2E;
          carry = state_of(in.initial_state, in.sequences.entering(b, 0), c, n0 + lane);
          checkpoint[n0 + lane] = carry;
        } else if (in.d_state > kWarp) {
          rate = in.A.at(0, c, n0 + lane) * kLog2E;
          carry = checkpoint[n0 + lane];
        }
      } else {
        rate = carry = 0.0f;
      }

      const int states = min(kWarp, in.d_state - n0);
#pragma unroll 1
      for (int j = 0; j < states; j += STATES) {
        const int n = n0 + j;
        Items<T> loaded_b[STATES], loaded_c[STATES];
#pragma unroll
        for (int s = 0; s < STATES; ++s) {
          const int ahead = n + STATES + s;
          loaded_b[s] = next_b[s];
          loaded_c[s] = next_c[s];
          next_b[s] = rows_b.load(ahead, first, ahead < in.d_state ? valid : 0);
          next_c[s] = rows_c.load(ahead, first, ahead < in.d_state ? valid : 0);
        }
        float decay[STATES][kItems], input[STATES][kItems];
        float h[STATES], span[STATES], entering[STATES];
#pragma unroll
        for (int s = 0; s < STATES; ++s) {
          const float state_rate = __shfl_sync(kAllLanes, rate, j + s);
          entering[s] = __shfl_sync(kAllLanes, carry, j + s);
          rows_b.values(loaded_b[s], n + s, n + s < in.d_state, input[s]);
#pragma unroll
          for (int i = 0; i < kItems; ++i) {
            decay[s][i] = exp2_approx(delta[i] * state_rate);
            input[s][i] *= x[i];
          }
          if (cuts.numbered) {
#pragma unroll
            for (int i = 0; i < kItems; ++i) {
              if ((cuts.begins >> i & 1u) != 0u && n + s < in.d_state) {
                const int from = in.sequences.entering(b, first + i);
                const float start = state_of(in.initial_state, from, c, n + s);
                input[s][i] = fmaf(decay[s][i], start, input[s][i]);
              }
            }
          }
          span[s] = exp2_approx(elapsed * state_rate);
          h[s] = input[s][0];
#pragma unroll
          for (int i = 1; i < kItems; ++i) {
            const float before = in.sequences.present() ? cuts.before_step(i, h[s], 0.0f) : h[s];
            h[s] = fmaf(decay[s][i], before, input[s][i]);
          }
        }
#pragma unroll
        for (int offset = 1; offset < kWarp; offset *= 2) {
#pragma unroll
          for (int s = 0; s < STATES; ++s) {
            const float before = __shfl_up_sync(kAllLanes, h[s], offset);
            const float span_before = __shfl_up_sync(kAllLanes, span[s], offset);
            if (offset <= cuts.before) {
              h[s] = fmaf(span[s], before, h[s]);
              span[s] *= span_before;
            }
          }
        }
#pragma unroll
        for (int s = 0; s < STATES; ++s) {
          const float leaving = cuts.from_start ? fmaf(span[s], entering[s], h[s]) : h[s];
          const float before = __shfl_up_sync(kAllLanes, leaving, 1);
          const float tile_end = __shfl_sync(kAllLanes, leaving, kWarp - 1);
          carry = lane == j + s ? tile_end : carry;
          float state = lane == 0 ? entering[s] : before;
          float c_values[kItems];
          rows_c.values(loaded_c[s], n + s, n + s < in.d_state, c_values);
#pragma unroll
          for (int i = 0; i < kItems; ++i) {
            state = in.sequences.present() ? cuts.before_step(i, state, 0.0f) : state;
            state = fmaf(decay[s][i], state, input[s][i]);
            y[i] = fmaf(state, c_values[i], y[i]);
            if (cuts.numbered && (cuts.ends >> i & 1u) != 0u && n + s < in.d_state) {
              const int to = in.sequences.leaving(b, first + i);
              if (to >= 0) {
                args.last_state.at(to, c, n + s) = state;
              }
            }
          }
        }
      }
      if (lane_has_state) {
        if (t1 < in.length) {
          checkpoint[in.d_state + n0 + lane] = carry;
        } else {
          const int to = in.sequences.leaving(b, in.length - 1);
          if (to >= 0) {
            args.last_state.at(to, c, n0 + lane) = carry;
          }
        }
      }
    }
    gate(args.in, z, y);
    args.out.store(b, recomputed(c), first, valid, y);
    valid = next_valid;
    checkpoint += in.d_state;
  }
}

template <class T, std::size_t I>
constexpr auto forward_kernel() {
  constexpr ForwardConfig kConfig = kForwardConfigs[I];
  if constexpr (kConfig.mapping == Mapping::serial) {
    static_assert(kConfig.threads == kSerialThreads, "the kernel is written for this many threads");
    return &scan_serial<T, kConfig.scope, kConfig.lanes, kConfig.tile, kConfig.blocks>;
  } else {
    static_assert(kConfig.lanes == kWarp && kConfig.tile == kCheckpointInterval,
                  "the kernel is a warp per channel, a checkpoint per tile");
    // float's loads in flight take twice the registers of a 16-bit type's.
    constexpr int kBlocks = sizeof(T) == sizeof(float) ? 3 : kConfig.blocks;
    return &scan_lanes<T, kConfig.scope, kConfig.threads / kWarp, kConfig.states, kBlocks>;
  }
}

// params are in the order of the scan.
template <class T, std::size_t I>
void launch_forward(const ForwardParams& params, const Problem& problem) {
  constexpr ForwardConfig kConfig = kForwardConfigs[I];
  ForwardArgs<T, kConfig.scope> args;
  args.in = device_inputs<T, kConfig.scope>(params.in, problem.groups);
  args.out = sequence<T, kConfig.scope>(params.out);
  args.last_state = weights<float>(params.last_state);
  args.checkpoints = params.checkpoints.as<float>();

  const std::int64_t per_block = kConfig.threads / kConfig.lanes;
  const std::int64_t blocks =
      kConfig.mapping == Mapping::serial
          ? problem.groups * ceil_div(problem.channels_per_group(), per_block)
          : ceil_div(problem.channels, per_block);
  constexpr auto kKernel = forward_kernel<T, I>();
  kKernel<<<static_cast<unsigned>(count(problem.batch * blocks)), kConfig.threads, 0,
            static_cast<cudaStream_t>(params.stream)>>>(args);
  MAMBA_CUDA_CHECK_LAUNCH();
}

// The rows of kForwardConfigs.
template <class T, std::size_t... I>
void launch_forward_row(int row, const ForwardParams& params, const Problem& problem,
                        std::index_sequence<I...>) {
  using Launch = void (*)(const ForwardParams&, const Problem&);
  static constexpr Launch kRows[] = {&launch_forward<T, I>...};
  kRows[row](params, problem);
}

template <class Host>
void forward(const ForwardParams& params) {
  using T = mamba_native::cuda::DeviceType<Host>;
  const Problem problem = problem_of(params.in);
  const int row = choose_forward(problem, mamba_native::cuda::device_info(params.in.u.device.index),
                                 params.config);
  launch_forward_row<T>(row, in_scan_order(params), problem,
                        std::make_index_sequence<kForwardConfigCount>());
}

}  // namespace mamba_native::selective_scan::cuda
