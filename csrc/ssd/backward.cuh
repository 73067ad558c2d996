// The backward kernels and their host launcher. The room's README derives the gradient; with
// g = dL/dy and q[t] = dL/dS[t] = g[t] C[t]^T + exp(delta[t+1] A) q[t+1] it is, for a chunk that
// begins with the state S, and that q' = exp(delta[end] A) q[end] of the steps after it enters:
//   dx[s]  = delta[s] (sum_{t >= s} decay(s, t) (C[t].B[s]) g[t] + decay(s, end) q' B[s]) + D g[s]
//   dC[t]  = sum_h decay(-1, t) S^T g[t]                + sum_{s <= t} E[t, s] B[s]
//   dB[s]  = sum_h delta[s] decay(s, end) q'^T x[s]     + sum_{t >= s} E[t, s] C[t]
//   E[t,s] = sum_h decay(s, t) delta[s] (g[t].x[s])
// Two launches for a stretch of time: the states and adjoints between all its chunks, then all its
// chunks at once, where a CTA takes the heads of a group in turn, so that C B^T is computed once
// and the sums over heads stay in registers.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "ssd/sums.h"
#include "ssd/tensors.cuh"

namespace mamba_native::ssd::cuda {

template <class T>
struct BackwardArgs {
  DeviceInputs<T> in;
  Steps<const T> dout;
  Steps<T> dx, dz;
  Rates ddt;
  States dlast_states, dinitial_states;
  const float* checkpoints;
  Steps<float> dB, dC;      // of the first share of heads, and
  std::int64_t share;       // floats from one share's to the next's
  std::int64_t sums_begin;  // their first step
  int shares;               // CTAs that divide a group's heads among them
  std::int64_t begin, end;  // the stretch of time, in steps; begins at a checkpoint
  int all_windows;          // and in the whole sequence
  int plane;                // elements of a state in `entering` and `leaving`
  int row;                  // and of one channel of it
  T* entering;              // (windows, B, H, P, row): the state before each chunk
  T* leaving;               // the same shape: q' after each chunk
  float* carry;             // (B, H, P, N): q' between stretches
  float* dA;                // (B * all_windows, H): parts of sums, as are the next two
  float* ddt_bias;
  float* dD;  // as d_parts of plan.h says
  bool d_per_channel;
  int stages;  // heads whose tiles a CTA of the gradients holds

  __device__ __forceinline__ std::int64_t state_offset(int window, int b, int h, int p) const {
    return ((static_cast<std::int64_t>(window) * in.batch + b) * in.heads + h) * plane +
           static_cast<std::int64_t>(p) * row;
  }
  __device__ __forceinline__ States carried(int b) const {
    const std::int64_t head = static_cast<std::int64_t>(in.headdim) * in.states;
    return {carry + b * in.heads * head, 0, head, in.states, 1};
  }
};

// g = dL/dy = dout silu(z) of some steps, into a tile; as load_tile.
template <int THREADS, int ROWS, int COLUMNS, class T>
__device__ __forceinline__ void load_gated(T* to, int stride, const BackwardArgs<T>& args, int b,
                                           std::int64_t t, int h, int p, int valid_rows,
                                           int valid_columns, int thread) {
  const Steps<const T>& dout = args.dout;
  const Steps<const T>& z = args.in.z;
  const T* from = dout.at(b, t, h, p);
  if (z.data == nullptr) {
    load_tile<THREADS, ROWS, COLUMNS>(to, stride, from, dout.step, dout.element, dout.vectorize,
                                      valid_rows, valid_columns, thread);
    return;
  }
  using Vectors = TileVectors<T, COLUMNS, THREADS>;
  constexpr int kElements = Vectors::kElements;
  const int row = Vectors::row(thread), column = Vectors::column(thread);
  to += row * stride + column;
  from += row * dout.step + column * dout.element;
  const T* gates = z.at(b, t, h, p) + row * z.step + column * z.element;
#pragma unroll 1
  for (int r = row; r < ROWS; r += Vectors::kRows) {
    const int valid = r < valid_rows ? valid_columns - column : 0;
    float values[kElements], gate[kElements];
    load_span<kElements>(from, dout.element, valid, dout.vectorize, values);
    load_span<kElements>(gates, z.element, valid, z.vectorize, gate);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      values[i] *= fast_silu(gate[i]);
    }
    store_vector<kElements>(to, values);
    to += Vectors::kRows * stride;
    from += Vectors::kRows * dout.step;
    gates += Vectors::kRows * z.step;
  }
}

// ---- states and adjoints between chunks ----

inline constexpr int kStatesWarps = 8;

//   grid    first the adjoints, (b, block of P channels, head), each from the stretch's end to its
//           begin; then the states, (block of kCheckpointInterval steps, b, block of channels,
//           head)
//   CTA     as in the forward scan; between barriers: bring the chunk in; scale its x or g; the new
//           state
template <class T, int STEPS, int P, int N>
__global__ void __launch_bounds__(kStatesWarps* kWarp, kCtas)
    chunk_states(const BackwardArgs<T> args) {
  constexpr int kThreads = kStatesWarps * kWarp;
  using StateSplit = Split<P, N, kStatesWarps>;
  constexpr int kX = kRowStride<T, P>, kB = kRowStride<T, N>;
  static_assert(kCheckpointInterval % STEPS == 0, "checkpoints fall on chunk borders");

  extern __shared__ float4 shared_memory[];
  T* const x = reinterpret_cast<T*>(shared_memory);
  T* const B = x + STEPS * kX;
  T* const S = B + STEPS * kB;
  Decays<T, STEPS>& decays = *reinterpret_cast<Decays<T, STEPS>*>(S + P * kB);

  const DeviceInputs<T>& in = args.in;
  const int channel_blocks = (in.headdim + P - 1) / P;
  const int block = static_cast<int>(blockIdx.x) / in.heads;
  const int row_block = block / channel_blocks;  // b, then (block of steps, b)
  const int b = row_block % in.batch;
  const bool adjoint = row_block < in.batch;
  // Steps that this CTA visits.
  const std::int64_t first =
      adjoint ? args.begin : args.begin + (row_block / in.batch - 1) * kCheckpointInterval;
  const std::int64_t last = adjoint ? args.end : min(first + kCheckpointInterval, args.end);
  float state[StateSplit::kJ][4];

  std::int64_t begin = first, end = last;
  while (begin < last && end > first) {
    const int thread = recomputed(static_cast<int>(threadIdx.x));
    const int warp = thread / kWarp, lane = thread % kWarp;
    const int h = recomputed(static_cast<int>(blockIdx.x) % in.heads);
    const int p0 = recomputed(block % channel_blocks) * P;
    const int group = h / in.heads_per_group;
    const int channels = min(P, in.headdim - p0);
    const int state_p = StateSplit::row(warp), state_n = StateSplit::column(warp);
    const bool has_state = StateSplit::active(warp);

    bool at_border;  // between two chunks, or at an end of the sequence
    if (adjoint) {
      begin = in.sequences.begin_of(b, end, (end - 1) / STEPS * STEPS);
      at_border = end % STEPS == 0 || end == in.length;
      if (has_state) {
        if (in.sequences.ends(b, end - 1)) {
          load_states(state, in, args.dlast_states, in.sequences.leaving(b, end - 1), h,
                      p0 + state_p, state_n, lane);
        } else if (end == last) {
          load_states(state, in, args.carried(b), 0, h, p0 + state_p, state_n, lane);
        }
      }
    } else {
      end = in.sequences.end_of(b, begin, min((begin / STEPS + 1) * STEPS, last));
      at_border = begin % STEPS == 0;
      if (has_state) {
        if (in.sequences.begins(b, begin)) {
          load_states(state, in, in.initial_states, in.sequences.entering(b, begin), h,
                      p0 + state_p, state_n, lane);
        } else if (begin == first) {
          load_states(
              state, in,
              checkpoint(in, const_cast<float*>(args.checkpoints), b, begin / kCheckpointInterval),
              0, h, p0 + state_p, state_n, lane);
        }
      }
    }
    if (at_border && has_state) {
      store_fragments(state, S + state_p * kB + state_n, kB, lane);
    }
    const int steps = static_cast<int>(end - begin);
    const bool is_last = !adjoint && begin / STEPS == (last - 1) / STEPS;  // nobody asks for more
    if (adjoint) {
      load_gated<kThreads, STEPS, P>(x, kX, args, b, begin, h, p0, steps, channels, thread);
    } else if (!is_last) {
      load_tile<kThreads, STEPS, P>(x, kX, in.x.at(b, begin, h, p0), in.x.step, in.x.element,
                                    in.x.vectorize, steps, channels, thread);
    }
    if (!is_last) {
      const Steps<const T>& projection = adjoint ? in.C : in.B;
      load_tile<kThreads, STEPS, N>(B, kB, projection.at(b, begin, group, 0), projection.step,
                                    projection.element, projection.vectorize, steps, in.states,
                                    thread);
      if (warp == 0) {
        decays.prepare(in, b, h, begin, steps);
      }
    }
    mamba_native::cuda::wait_for_copies();
    __syncthreads();

    if (at_border) {
      const int window = static_cast<int>(((adjoint ? end - 1 : begin) - args.begin) / STEPS);
      T* const to = (adjoint ? args.leaving : args.entering) + args.state_offset(window, b, h, p0);
      store_tile<kThreads, P, N>(S, kB, to, args.row, 1, true, channels, args.row, thread);
    }
    if (is_last) {
      break;
    }
    if (adjoint) {
      scale_tile<kThreads, STEPS, P>(x, x, kX, AdjointFactor<T, STEPS>{decays}, thread);
    } else {
      scale_tile<kThreads, STEPS, P>(x, x, kX, DriveFactor<T, STEPS>{decays}, thread);
    }
    __syncthreads();

    if (has_state) {
      const float decay = decays.whole();
      scale_rows(state, decay, decay);
      multiply<StateSplit::kJ, Order::across_k, Order::across_k>(state, x + state_p, kX,
                                                                 B + state_n, kB, STEPS);
    }
    if (adjoint) {
      if (has_state && in.sequences.begins(b, begin)) {
        store_states(state, in, args.dinitial_states, in.sequences.entering(b, begin), h,
                     p0 + state_p, state_n, lane);
      }
      end = begin;
      begin = first;
    } else {
      begin = end;
      end = last;
    }
    __syncthreads();
  }
  if (adjoint && args.begin > 0) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    if (StateSplit::active(warp)) {
      store_states(state, in, args.carried(b), 0, static_cast<int>(blockIdx.x) % in.heads,
                   block % channel_blocks * P + StateSplit::row(warp), StateSplit::column(warp),
                   static_cast<int>(threadIdx.x) % kWarp);
    }
  }
}

// ---- chunks ----

// A state (P, N) into a tile: from the workspace, or where a sequence begins or ends inside of a
// chunk from row `row` of a tensor; 0 where there is no such row or no tensor.
template <int THREADS, int P, int N, class T>
__device__ __forceinline__ void load_state_tile(T* to, int stride, const BackwardArgs<T>& args,
                                                const T* between, bool own, const States& from,
                                                int row, int h, int p0, int channels, int thread) {
  if (!own) {
    load_tile<THREADS, P, N>(to, stride, between, args.row, 1, true, channels, args.row, thread);
    return;
  }
  const bool exists = from.data != nullptr && row >= 0;
#pragma unroll 1
  for (int i = thread; i < P * N; i += THREADS) {
    const int p = i / N, n = i % N;
    to[p * stride + n] = from_float<T>(
        exists && p < channels && n < args.in.states ? from.at(row, h, p0 + p, n) : 0.0f);
  }
}

// Sum over the four lanes that share a row of a product, and over the eight that share a column.
template <class Sum>
__device__ __forceinline__ Sum sum_of_row(Sum value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}
template <class Sum>
__device__ __forceinline__ Sum sum_of_column(Sum value) {
  value += __shfl_xor_sync(kAllLanes, value, 4);
  value += __shfl_xor_sync(kAllLanes, value, 8);
  return value + __shfl_xor_sync(kAllLanes, value, 16);
}

// sum = value, or += where there is a sum already.
template <class Sum>
__device__ __forceinline__ void add_up(Sum& sum, Sum value, bool is_first) {
  sum = is_first ? value : sum + value;
}

// A lane's share of the sums of rows `upper` and `upper` + 8 of a product.
template <class Sum>
__device__ __forceinline__ void store_row_sums(Sum* sums, const Sum (&shares)[2], int upper,
                                               bool is_first) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Sum sum = sum_of_row(shares[i]);
    if (threadIdx.x % 4 == 0) {
      add_up(sums[upper + 8 * i], sum, is_first);
    }
  }
}

// Decays' gradients are differences of sums over pairs of steps, most of which cancels: float32
// needs more digits for them.
template <class T>
using PairSum = std::conditional_t<sizeof(T) == sizeof(float), double, float>;

// What the warps of a CTA add up for one head; sums over channels and states.
template <class T, int STEPS, int N, int WARPS>
struct HeadSums {
  static constexpr int kColumnBlocks = Split<STEPS, N, WARPS>::kColumnBlocks;
  PairSum<T> row[kColumnBlocks][STEPS];  // of t: gradient of the decays that end with it
  float direct[kColumnBlocks][STEPS];    // of s: decay(s, end) (q' B[s]).x[s]
  PairSum<T> column[STEPS / 16]
                   [STEPS];  // of s: gradient of the decays that begin after it, / delta
  float diagonal[STEPS];     // (C[s].B[s]) (g[s].x[s])
  float whole[WARPS];        // S.q'
};

// The steps' gradient once a head's sums are complete, by one warp. With a = delta A, and T, U, V
// for the sums over pairs of steps, from the state and to the adjoint, the gradient of a[u] is that
// of all decays over u:
//   sum_{s < u <= t} T[t, s] + sum_{t >= u} V[t] + sum_{s < u} U[s] + decay(-1, end) S.q'
template <class T, int STEPS, int N, int WARPS>
__device__ __forceinline__ void finish_steps(const BackwardArgs<T>& args,
                                             const HeadSums<T, STEPS, N, WARPS>& sums,
                                             const Decays<T, STEPS>& decays, int b, int h,
                                             std::int64_t begin, int steps, bool add) {
  constexpr int kItems = STEPS > kWarp ? STEPS / kWarp : 1;
  const DeviceInputs<T>& in = args.in;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  double after[kItems], before[kItems];  // of each step: its own share of the sums above
  float ddelta[kItems];
  double after_sum = 0.0, before_sum = 0.0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int u = lane * kItems + i;
    double row = 0.0, column = 0.0, direct = 0.0, delta = 0.0;
    float diagonal = 0.0f;
    if (u < STEPS) {
      for (int j = 0; j < HeadSums<T, STEPS, N, WARPS>::kColumnBlocks; ++j) {
        row += sums.row[j][u];
        direct += sums.direct[j][u];
      }
      for (int j = u / 16; j < STEPS / 16; ++j) {
        column += sums.column[j][u];
      }
      diagonal = sums.diagonal[u];
      delta = decays.delta[u];
    }
    ddelta[i] = static_cast<float>(column + direct) + diagonal;
    after[i] = row - delta * column;  // in double: most of both may cancel
    before[i] = delta * direct;
    after_sum += after[i];
    before_sum += before[i];
  }
  double later = after_sum,
         earlier = before_sum;  // of this lane's steps and all after, before them
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const double up = __shfl_up_sync(kAllLanes, earlier, offset);
    const double down = __shfl_down_sync(kAllLanes, later, offset);
    earlier += lane >= offset ? up : 0.0;
    later += lane + offset < kWarp ? down : 0.0;
  }
  earlier -= before_sum;
  float whole = lane < WARPS ? sums.whole[lane] : 0.0f;
  whole = mamba_native::cuda::warp_sum(whole) * decays.whole();
  const float A = in.A.at(h, 0);
  double dA = 0.0;
  float dbias = 0.0f;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int u = lane * kItems + i;
    if (u < steps) {
      float slope;
      const float delta = in.discretise(b, begin + u, h, &slope);
      const double exponent = later + earlier + static_cast<double>(whole);
      const float ddt = slope * fmaf(A, static_cast<float>(exponent), ddelta[i]);
      mamba_native::cuda::store_weight(args.ddt.data, args.ddt.dtype,
                                       args.ddt.offset(b, begin + u, h), ddt);
      dA += static_cast<double>(delta) * exponent;
      dbias += ddt;
    }
    later -= after[i];
    earlier += before[i];
  }
  const float dA_sum = mamba_native::cuda::warp_sum(static_cast<float>(dA));
  dbias = mamba_native::cuda::warp_sum(dbias);
  if (lane == 0) {
    const std::int64_t at =
        (static_cast<std::int64_t>(b) * args.all_windows + begin / STEPS) * in.heads + h;
    args.dA[at] = add ? args.dA[at] + dA_sum : dA_sum;
    args.ddt_bias[at] = add ? args.ddt_bias[at] + dbias : dbias;
  }
}

// dz = dout y silu'(z) of this lane's part of a product: `y` has the outputs without D x, `x` is
// the warp's part of x's tile.
template <int J, class T>
__device__ __forceinline__ void store_gate_gradients(const float (&y)[J][4], const T* x, int stride,
                                                     const BackwardArgs<T>& args, int b,
                                                     std::int64_t t, int h, int p, int valid_rows,
                                                     int valid_columns, int lane) {
  const DeviceInputs<T>& in = args.in;
  const int row = fragment_row(lane), column = fragment_column(lane);
  const T* const douts = args.dout.at(b, t + row, h, p + column);
  const T* const gates = in.z.at(b, t + row, h, p + column);
  T* const to = args.dz.at(b, t + row, h, p + column);
#pragma unroll
  for (int j = 0; j < J; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int down = e / 2 * 8, right = 8 * j + e % 2;
      if (row + down < valid_rows && column + right < valid_columns) {
        const float skip = as_float(x[(row + down) * stride + column + right]);
        const float out = fmaf(in.D.at(h, p + column + right), skip, y[j][e]);
        const float dout = as_float(douts[down * args.dout.step + right * args.dout.element]);
        const float gate = as_float(gates[down * in.z.step + right * in.z.element]);
        to[down * args.dz.step + right * args.dz.element] =
            from_float<T>(dout * out * fast_silu_grad(gate));
      }
    }
  }
}

// A part of dD: `skip` has this lane's g x of channels `column` and `column` + 1 of each eight of
// the warp's 16 x 16 block. Every block has a place, so that no warp waits for another.
template <int STEPS, int P, class T>
__device__ __forceinline__ void store_skip_sums(const float (&skip)[2][2],
                                                const BackwardArgs<T>& args, int b,
                                                std::int64_t begin, int h, int s0, int p0, int c0,
                                                bool is_first_piece, int lane) {
  const DeviceInputs<T>& in = args.in;
  const std::int64_t window = static_cast<std::int64_t>(b) * args.all_windows + begin / STEPS;
  if (args.d_per_channel) {
    float* const to =
        args.dD + ((window * (STEPS / 16) + s0 / 16) * in.heads + h) * in.headdim + p0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float sum = sum_of_column(skip[i / 2][i % 2]);
      const int column = c0 + i / 2 * 8 + 2 * lane + i % 2;
      if (lane < 4 && p0 + column < in.headdim) {
        add_up(to[column], sum, is_first_piece);
      }
    }
    return;
  }
  const float sum =
      mamba_native::cuda::warp_sum(skip[0][0] + skip[0][1] + (skip[1][0] + skip[1][1]));
  if (lane == 0) {
    constexpr int kColumnBlocks = P / 16, kParts = STEPS / 16 * kColumnBlocks;
    add_up(args.dD[(window * in.heads + h) * kParts + s0 / 16 * kColumnBlocks + c0 / 16], sum,
           is_first_piece && p0 == 0);
  }
}

// What a CTA of the gradients has in shared memory for all heads, and for each.
template <class T, int STEPS, int N, int WARPS>
struct GroupTiles {
  alignas(16) T B[STEPS * kRowStride<T, N>];
  T C[STEPS * kRowStride<T, N>];
  T scores[STEPS * kRowStride<T, STEPS>];
  HeadSums<T, STEPS, N, WARPS> sums;
};
template <class T, int STEPS, int P, int N>
struct HeadTiles {
  alignas(16) T S[P * kRowStride<T, N>];  // the state that enters
  T Q[P * kRowStride<T, N>];              // and the adjoint after the chunk
  T x[STEPS * kRowStride<T, P>];
  T g[STEPS * kRowStride<T, P>];
  Decays<T, STEPS> decays;
};

// This warp has no block of the scores, so it prepares the decays.
inline constexpr int kDecayWarp = 3;

// Starts to bring a piece's tiles of one head in: channels from p0 on.
template <int WARPS, class T, int STEPS, int P, int N>
__device__ __forceinline__ void load_head(HeadTiles<T, STEPS, P, N>& to,
                                          const BackwardArgs<T>& args, int window, int b, int h,
                                          int p0, std::int64_t begin, int steps) {
  constexpr int kThreads = WARPS * kWarp;
  constexpr int kX = kRowStride<T, P>, kB = kRowStride<T, N>;
  const DeviceInputs<T>& in = args.in;
  const int thread = recomputed(static_cast<int>(threadIdx.x));
  const int channels = min(P, in.headdim - p0);
  const std::int64_t state = args.state_offset(window, b, h, p0), end = begin + steps;
  const bool begins_inside = begin % STEPS != 0;
  const bool ends_inside = end % STEPS != 0 && end != in.length;
  load_state_tile<kThreads, P, N>(
      to.S, kB, args, args.entering + state, begins_inside, in.initial_states,
      begins_inside ? in.sequences.entering(b, begin) : -1, h, p0, channels, thread);
  load_state_tile<kThreads, P, N>(
      to.Q, kB, args, args.leaving + state, ends_inside, args.dlast_states,
      ends_inside ? in.sequences.leaving(b, end - 1) : -1, h, p0, channels, thread);
  load_tile<kThreads, STEPS, P>(to.x, kX, in.x.at(b, begin, h, p0), in.x.step, in.x.element,
                                in.x.vectorize, steps, channels, thread);
  load_gated<kThreads, STEPS, P>(to.g, kX, args, b, begin, h, p0, steps, channels, thread);
  if (thread / kWarp == kDecayWarp) {
    to.decays.prepare(in, b, h, begin, steps);
  }
}

//   grid    (window of STEPS steps, b, group, share of the group's heads), one dimension
//   CTA     takes the pieces into which sequences cut its window in turn, and for each the heads,
//           P channels at a time; C B^T, E, dB and dC stay in registers
//   shared  the piece's B, C, scores and sums over warps; of the head S, q', x and g, and with two
//           stages those of the next, which arrive meanwhile
template <class T, int STEPS, int P, int N, int WARPS>
__global__ void __launch_bounds__(WARPS* kWarp, 1) chunk_gradients(const BackwardArgs<T> args) {
  constexpr int kThreads = WARPS * kWarp;
  using ChannelSplit = Split<STEPS, P, WARPS>;
  using StateSplit = Split<STEPS, N, WARPS>;
  using ScoreSplit = Split<STEPS, STEPS, WARPS>;
  using Sums = HeadSums<T, STEPS, N, WARPS>;
  using Group = GroupTiles<T, STEPS, N, WARPS>;
  using Head = HeadTiles<T, STEPS, P, N>;
  constexpr int kX = kRowStride<T, P>, kB = kRowStride<T, N>, kM = kRowStride<T, STEPS>;
  constexpr int kJN = StateSplit::kJ, kJP = ChannelSplit::kJ;
  static_assert(ScoreSplit::kJ == 2 && kJP == 2, "a warp has one block of scores, one of x");

  extern __shared__ float4 shared_memory[];
  Group& tiles = *reinterpret_cast<Group*>(shared_memory);
  Head* const heads = reinterpret_cast<Head*>(&tiles + 1);
  T* const B = tiles.B;
  T* const C = tiles.C;
  T* const scores = tiles.scores;
  Sums& sums = tiles.sums;

  const DeviceInputs<T>& in = args.in;
  const bool two_stages = args.stages == 2;
  const int groups = in.heads / in.heads_per_group;
  const int share = static_cast<int>(blockIdx.x) % args.shares;
  const int group = static_cast<int>(blockIdx.x) / args.shares % groups;
  const int row_block = static_cast<int>(blockIdx.x) / args.shares / groups;
  const int entry = row_block % in.batch;
  const int window = row_block / in.batch;
  const int first_head = group * in.heads_per_group + share * in.heads_per_group / args.shares;
  const int last_head = group * in.heads_per_group + (share + 1) * in.heads_per_group / args.shares;

  const std::int64_t first = args.begin + static_cast<std::int64_t>(window) * STEPS;
  const int all_steps = static_cast<int>(min(static_cast<std::int64_t>(STEPS), args.end - first));
  int steps = 0;
  for (int piece = 0; piece < all_steps; piece += steps) {
    steps = static_cast<int>(in.sequences.end_of(entry, first + piece, first + all_steps) - first) -
            piece;
    float dB[kJN][4], dC[kJN][4], products[2][4], dproducts[2][4];
    clear(dB);
    clear(dC);
    clear(products);
    clear(dproducts);
    {
      const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
      load_tile<kThreads, STEPS, N>(B, kB, in.B.at(entry, first + piece, group, 0), in.B.step,
                                    in.B.element, in.B.vectorize, steps, in.states, thread);
      load_tile<kThreads, STEPS, N>(C, kB, in.C.at(entry, first + piece, group, 0), in.C.step,
                                    in.C.element, in.C.vectorize, steps, in.states, thread);
      mamba_native::cuda::wait_for_copies();
      __syncthreads();
      if (ScoreSplit::column(warp) <= ScoreSplit::row(warp)) {
        multiply<2, Order::along_k, Order::along_k>(products, C + ScoreSplit::row(warp) * kB, kB,
                                                    B + ScoreSplit::column(warp) * kB, kB,
                                                    depth_of(in.states));
      }
    }

    // While a head's channels are computed, those of the next come in, if there are two stages.
    int next_head = first_head, next_channel = 0, stage = 0;
    bool is_ahead = !two_stages;
    for (int head = first_head, channel = 0; head < last_head;) {
      const std::int64_t begin =
          args.begin + static_cast<std::int64_t>(recomputed(window)) * STEPS + piece;
      const int b = recomputed(entry);
      if (two_stages) {
        mamba_native::cuda::wait_for_copies();
      }
      __syncthreads();  // the head is there, and nobody reads what the next one overwrites
      if (next_head < last_head) {
        load_head<WARPS>(heads[stage], args, window, b, next_head, next_channel, begin, steps);
        next_channel += P;
        if (next_channel >= in.headdim) {
          next_channel = 0;
          ++next_head;
        }
      }
      stage = two_stages ? 1 - stage : 0;
      if (!is_ahead) {
        is_ahead = true;
        continue;
      }
      if (!two_stages) {
        mamba_native::cuda::wait_for_copies();
        __syncthreads();
      }
      const int h = head, p0 = channel;
      channel += P;
      if (channel >= in.headdim) {
        channel = 0;
        ++head;
      }
      Head& tile = heads[stage];
      const T* const S = tile.S;
      const T* const Q = tile.Q;
      T* const x = tile.x;
      const T* const g = tile.g;
      const Decays<T, STEPS>& decays = tile.decays;
      const int channels = min(P, in.headdim - p0);
      const bool is_first = p0 == 0;  // of the head: sums begin
      {                               // scores, sums, dB and dC
        const int thread = recomputed(static_cast<int>(threadIdx.x));
        const int warp = thread / kWarp, lane = thread % kWarp;
        PairSum<T> row_sums[2] = {};
        const int score_row = ScoreSplit::row(warp), score_column = ScoreSplit::column(warp);
        if (score_column <= score_row) {
          PairSum<T> column_sums[4] = {};
          float block[2][4];
          clear(block);
          multiply<2, Order::along_k, Order::along_k>(block, g + score_row * kX, kX,
                                                      x + score_column * kX, kX, P);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int t = score_row + fragment_row(lane) + e / 2 * 8;
              const int s = score_column + 8 * j + fragment_column(lane) + e % 2;
              const bool is_pair = s <= t;
              const float decay = is_pair ? decays.between(s, t) : 0.0f;
              const float score = products[j][e] * decay;
              const float gradient = block[j][e] * score;
              const float dproduct = block[j][e] * decay * decays.delta[s];
              dproducts[j][e] += is_pair ? dproduct : 0.0f;
              block[j][e] = is_pair ? score * decays.delta[s] : 0.0f;
              if (s < t) {
                row_sums[e / 2] += PairSum<T>{gradient} * PairSum<T>{decays.delta[s]};
                column_sums[2 * j + e % 2] += PairSum<T>{gradient};
              } else if (s == t) {
                add_up(sums.diagonal[s], gradient, is_first);
              }
            }
          }
          store_fragments(block, scores + score_row * kM + score_column, kM, lane);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const PairSum<T> sum = sum_of_column(column_sums[i]);
            if (lane < 4) {
              add_up(sums.column[score_row / 16][score_column + i / 2 * 8 + 2 * lane + i % 2], sum,
                     is_first);
            }
          }
        }
        const int row = StateSplit::row(warp), column = StateSplit::column(warp);
        const int upper = row + fragment_row(lane), lower = upper + 8;
        if (column < depth_of(in.states) && StateSplit::active(warp)) {
          float part[kJN][4];
          clear(part);
          multiply<kJN, Order::along_k, Order::across_k>(part, g + row * kX, kX, S + column, kB, P);
          scale_rows(part, decays.from_start(upper), decays.from_start(lower));
#pragma unroll
          for (int j = 0; j < kJN; ++j) {
            const int n = column + 8 * j + fragment_column(lane);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              float c[2];
              load_vector<2>(C + (i == 0 ? upper : lower) * kB + n, c);
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                row_sums[i] += PairSum<T>{part[j][2 * i + e] * c[e]};
                dC[j][2 * i + e] += part[j][2 * i + e];
              }
            }
          }
          store_row_sums(sums.row[warp % Sums::kColumnBlocks], row_sums, upper, is_first);
          float direct[2] = {0.0f, 0.0f};
          clear(part);
          multiply<kJN, Order::along_k, Order::across_k>(part, x + row * kX, kX, Q + column, kB, P);
          scale_rows(part, decays.to_end(upper), decays.to_end(lower));
#pragma unroll
          for (int j = 0; j < kJN; ++j) {
            const int n = column + 8 * j + fragment_column(lane);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int s = i == 0 ? upper : lower;
              float of_b[2];
              load_vector<2>(B + s * kB + n, of_b);
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                direct[i] = fmaf(part[j][2 * i + e], of_b[e], direct[i]);
                dB[j][2 * i + e] = fmaf(part[j][2 * i + e], decays.delta[s], dB[j][2 * i + e]);
              }
            }
          }
          store_row_sums(sums.direct[warp % Sums::kColumnBlocks], direct, upper, is_first);
        } else {
          store_row_sums(sums.row[warp % Sums::kColumnBlocks], row_sums, upper, is_first);
          const float direct[2] = {0.0f, 0.0f};
          store_row_sums(sums.direct[warp % Sums::kColumnBlocks], direct, upper, is_first);
        }
        float whole = 0.0f;
        constexpr int kVector = 16 / static_cast<int>(sizeof(T));
#pragma unroll 1
        for (int v = thread; v < P * N / kVector; v += kThreads) {
          const int at = v / (N / kVector) * kB + v % (N / kVector) * kVector;
          float state[kVector], adjoint[kVector];
          load_vector<kVector>(S + at, state);
          load_vector<kVector>(Q + at, adjoint);
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            whole = fmaf(state[i], adjoint[i], whole);
          }
        }
        whole = mamba_native::cuda::warp_sum(whole);
        if (lane == 0) {
          add_up(sums.whole[warp], whole, is_first);
        }
        __syncthreads();
      }
      // dz, dx and dD
      const int thread = recomputed(static_cast<int>(threadIdx.x));
      const int warp = thread / kWarp, lane = thread % kWarp;
      const int s0 = ChannelSplit::row(warp), c0 = ChannelSplit::column(warp);
      const bool has_channels = ChannelSplit::active(warp);
      const int s_upper = s0 + fragment_row(lane), s_lower = s_upper + 8;
      float part[kJP][4];
      if (in.z.data != nullptr) {
        if (has_channels) {
          clear(part);
          multiply<kJP, Order::along_k, Order::along_k>(part, C + s0 * kB, kB, S + c0 * kB, kB,
                                                        depth_of(in.states));
          scale_rows(part, decays.from_start(s_upper), decays.from_start(s_lower));
          multiply<kJP, Order::along_k, Order::across_k>(part, scores + s0 * kM, kM, x + c0, kX,
                                                         s0 + 16);
          store_gate_gradients(part, x + s0 * kX + c0, kX, args, b, begin + s0, h, p0 + c0,
                               steps - s0, channels - c0, lane);
        }
        __syncthreads();  // dx is staged in x's tile
      }
      if (has_channels) {
        clear(part);
        multiply<kJP, Order::along_k, Order::along_k>(part, B + s0 * kB, kB, Q + c0 * kB, kB,
                                                      depth_of(in.states));
        scale_rows(part, decays.delta[s_upper] * decays.to_end(s_upper),
                   decays.delta[s_lower] * decays.to_end(s_lower));
        multiply<kJP, Order::across_k, Order::across_k>(part, scores + s0 * kM + s0, kM,
                                                        g + s0 * kX + c0, kX, STEPS - s0);
        T* const stage = x + s0 * kX + c0;
        if (in.D.data != nullptr) {
          float skip[kJP][2] = {};
          const float D_of_head = in.D.at(h, 0);
#pragma unroll
          for (int j = 0; j < kJP; ++j) {
            const int p = c0 + 8 * j + fragment_column(lane);
            float D[2] = {D_of_head, D_of_head};
            if (in.D.channel != 0) {
              D[0] = in.D.at(h, min(p0 + p, in.headdim - 1));
              D[1] = in.D.at(h, min(p0 + p + 1, in.headdim - 1));
            }
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
              const int at = (e == 0 ? s_upper : s_lower) * kX + p;
              float of_g[2], of_x[2];
              load_vector<2>(g + at, of_g);
              load_vector<2>(x + at, of_x);
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                part[j][e + i] = fmaf(D[i], of_g[i], part[j][e + i]);
                skip[j][i] = fmaf(of_g[i], of_x[i], skip[j][i]);
              }
            }
          }
          store_skip_sums<STEPS, P>(skip, args, b, begin, h, s0, p0, c0, piece == 0, lane);
        }
        __syncwarp();
        store_fragments(part, stage, kX, lane);
        __syncwarp();
        store_tile<kWarp, 16, ChannelSplit::kWidth>(
            stage, kX, args.dx.at(b, begin + s0, h, p0 + c0), args.dx.step, args.dx.element,
            args.dx.vectorize, steps - s0, channels - c0, lane);
      }
      if (warp == WARPS - 1 && p0 + P >= in.headdim) {
        finish_steps(args, sums, decays, b, h, begin, steps, piece > 0);
      }
    }

    const int thread = recomputed(static_cast<int>(threadIdx.x));
    const int warp = thread / kWarp, lane = thread % kWarp;
    __syncthreads();
    if (ScoreSplit::column(warp) <= ScoreSplit::row(warp)) {
      store_fragments(dproducts, scores + ScoreSplit::row(warp) * kM + ScoreSplit::column(warp), kM,
                      lane);
    }
    __syncthreads();
    const int row = StateSplit::row(warp), column = StateSplit::column(warp);
    if (StateSplit::active(warp)) {
      multiply<kJN, Order::along_k, Order::across_k>(dC, scores + row * kM, kM, B + column, kB,
                                                     row + 16);
      multiply<kJN, Order::across_k, Order::across_k>(dB, scores + row * kM + row, kM,
                                                      C + row * kB + column, kB, STEPS - row);
#pragma unroll
      for (int j = 0; j < kJN; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int t = row + fragment_row(lane) + e / 2 * 8;
          const int n = column + 8 * j + fragment_column(lane) + e % 2;
          if (t < steps && n < in.states) {
            const std::int64_t step = first + piece + t - args.sums_begin;
            args.dB.at(entry, step, group, n)[share * args.share] = dB[j][e];
            args.dC.at(entry, step, group, n)[share * args.share] = dC[j][e];
          }
        }
      }
    }
    __syncthreads();
  }
}

template <class T>
using BackwardKernel = void (*)(BackwardArgs<T>);

template <class T, std::size_t I>
constexpr BackwardKernel<T> states_kernel() {
  constexpr Config kConfig = config_of(static_cast<int>(I), sizeof(T));
  return &chunk_states<T, kConfig.steps, kConfig.headdim, kConfig.states>;
}

template <class T, std::size_t I>
constexpr BackwardKernel<T> gradients_kernel() {
  constexpr Config kConfig = config_of(static_cast<int>(I), sizeof(T));
  static_assert(sizeof(GroupTiles<T, kConfig.steps, kConfig.states, kConfig.warps>) +
                        sizeof(HeadTiles<T, kConfig.steps, kConfig.headdim, kConfig.states>) ==
                    gradients_shared_memory(kConfig, sizeof(T), 1),
                "the plan counts what the kernel has");
  return &chunk_gradients<T, kConfig.steps, kConfig.headdim, kConfig.states, kConfig.warps>;
}

template <class T, std::size_t... I>
BackwardKernel<T> find_states_kernel(int index, std::index_sequence<I...>) {
  static constexpr BackwardKernel<T> kKernels[] = {states_kernel<T, I>()...};
  return kKernels[index];
}

template <class T, std::size_t... I>
BackwardKernel<T> find_gradients_kernel(int index, std::index_sequence<I...>) {
  static constexpr BackwardKernel<T> kKernels[] = {gradients_kernel<T, I>()...};
  return kKernels[index];
}

template <class Host>
void backward(const BackwardParams& params) {
  using T = mamba_native::cuda::DeviceType<Host>;
  const BackwardPlan plan = plan_backward(params);
  const Config& config = config_of(plan.config, sizeof(T));
  const TensorView& x = params.in.x;
  const std::int64_t batch = x.size[0], length = x.size[1], heads = x.size[2];
  const std::int64_t groups = params.in.B.size[2], states_count = params.in.B.size[3];

  BackwardArgs<T> args;
  args.in = device_inputs<T>(params.in);
  args.dout = steps<const T>(params.dout);
  args.dx = steps<T>(params.dx);
  args.dz = steps<T>(params.dz);
  args.ddt = rates(params.ddt);
  args.dlast_states = states(params.dlast_states);
  args.dinitial_states = states(params.dinitial_states);
  args.checkpoints = params.checkpoints.as<const float>();
  args.dB = steps<float>(params.dB);
  args.dC = steps<float>(params.dC);
  args.share = 0;
  args.sums_begin = 0;
  args.shares = plan.shares;
  args.stages = plan.stages;
  args.all_windows = count(ceil_div(length, config.steps));
  args.row = count(plan.row);
  args.plane = count(x.size[3] * plan.row);
  float* const workspace = params.workspace.as<float>();
  args.dA = workspace + plan.dA;
  args.ddt_bias = workspace + plan.ddt_bias;
  args.dD = workspace + plan.dD;
  args.d_per_channel = params.in.D.dim == 2;
  args.carry = workspace + plan.carry;
  args.entering = reinterpret_cast<T*>(workspace + plan.entering);
  args.leaving = reinterpret_cast<T*>(workspace + plan.leaving);
  float* const parts[] = {workspace + plan.dB, workspace + plan.dC};

  const std::int64_t channel_blocks = ceil_div(x.size[3], config.headdim);
  const std::int64_t stretches = ceil_div(length, plan.stretch);
  for (std::int64_t stretch = stretches - 1; stretch >= 0; --stretch) {
    args.begin = stretch * plan.stretch;
    args.end = std::min(length, args.begin + plan.stretch);
    const std::int64_t windows = (ceil_div(args.end - args.begin, config.steps));
    if (plan.shares > 1) {
      args.sums_begin = args.begin;
      args.share = batch * (args.end - args.begin) * groups * states_count;
      args.dB = args.dC = {parts[0],
                           (args.end - args.begin) * groups * states_count,
                           groups * states_count,
                           states_count,
                           1,
                           false};
      args.dC.data = parts[1];
    }
    const std::int64_t blocks = ceil_div(args.end - args.begin, kCheckpointInterval);
    launch(find_states_kernel<T>(plan.config, std::make_index_sequence<kConfigCount>()),
           batch * channel_blocks * heads * (1 + blocks), kStatesWarps,
           states_shared_memory(config, sizeof(T)), args, params.stream);
    launch(find_gradients_kernel<T>(plan.config, std::make_index_sequence<kConfigCount>()),
           windows * batch * groups * plan.shares, config.warps,
           gradients_shared_memory(config, sizeof(T), plan.stages), args, params.stream);
    if (plan.shares > 1) {
      sum_parts(params.dB, params.dC, parts[0], parts[1], plan.shares, args.begin, args.end,
                params.stream);
    }
  }
  const std::int64_t rows = batch * args.all_windows;
  sum_rows(params.dA, args.dA, rows, 1, params.stream);
  sum_rows(params.ddt_bias, args.ddt_bias, rows, 1, params.stream);
  const DParts d = d_parts(config, args.d_per_channel, x.size[3]);
  sum_rows(params.dD, args.dD, rows * d.rows, d.columns, params.stream);
}

}  // namespace mamba_native::ssd::cuda
