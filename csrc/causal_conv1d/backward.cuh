// Backward convolution on CUDA.
//
//   dp[t]      = dout[t] act'(p[t]), p recomputed; 0 where seq_idx[t] < 0
//   dx[t]      = sum_w weight[w] dp[t + (W-1-w)]  (+ dfinal_states), for the columns before x too
//   dweight[w] = sum_{b,t} dp[t] x[t - (W-1-w)],  dbias = sum_{b,t} dp[t]
//
// along_time      channel-first. A thread has ITEMS steps of a channel and recomputes dp of the W-1
//                 steps behind them, so that nothing is exchanged. It walks `steps` vectors,
//                 blockDim.x apart. blockDim = (lanes along time, channels)
// along_channels  channel-last. A thread slides over `steps` steps of CHANNELS channels with the
//                 last W-1 columns of x and of unfinished dx in registers; step t adds its dp to
//                 the W columns that its output saw and completes the oldest. It goes W-1 steps
//                 beyond its own. blockDim = (lanes along channels, segments of time)
//
// Sums over time and batch stay in registers, are added up within the warp (along_time) or within
// the thread block through shared memory (along_channels), and leave as one number per weight and
// block: added to the sum atomically, or stored in the block's row of the workspace.
//
//   grid.x = (block of channels, block along time), grid.y = batch; both kernels take any strides.
//   WIDTH = kMaxWidth stands for any width up to that, with the oldest taps missing.
#pragma once

#include <type_traits>
#include <utility>

#include "causal_conv1d/tensors.cuh"
#include "core/cuda/launch.h"
#include "core/cuda/ordered_sums.h"

namespace mamba_native::causal_conv1d::cuda {

template <class T>
struct DeviceBackward {
  DeviceInputs<T> in;
  Sequence<const T> dout, dfinal_states;
  Sequence<T> dx, dinitial_states;
  float* dweight;          // (D, W), zeroed, or of the workspace's first row
  float* dbias;            // (D), likewise, or null
  std::int64_t workspace;  // distance of the workspace's rows; 0: there is none
  unsigned segments;
  std::int64_t steps;

  // The thread block's shares of the sums start here.
  __device__ __forceinline__ float* shares_of(float* sums) const {
    return sums + (blockIdx.x % segments * std::int64_t{gridDim.y} + blockIdx.y) * workspace;
  }
  __device__ __forceinline__ void add(float* to, float share) const {
    if (workspace == 0) {
      atomicAdd(to, share);
    } else {
      *to = share;
    }
  }
};

// Per multiprocessor: what their work needs in registers, which the compiler exceeds unasked.
template <int WIDTH, int ITEMS>
inline constexpr int kBackwardBlocks = ITEMS == 8   ? 7
                                       : WIDTH == 2 ? 6
                                                    : 5;

template <class T, int WIDTH, int ITEMS>
__global__ void __launch_bounds__(kMaxThreads, kBackwardBlocks<WIDTH, ITEMS>)
    backward_along_time(const DeviceBackward<T> p) {
  constexpr int kHalo = WIDTH - 1;
  constexpr int kSeen = ITEMS + kHalo;  // steps whose dp reaches the thread's dx
  const std::int64_t length = p.in.length;
  const std::int64_t d = std::int64_t{blockIdx.x / p.segments} * blockDim.y + threadIdx.y;
  const bool live = d < p.in.channels;  // the others only help to sum
  const std::int64_t stride = std::int64_t{blockDim.x} * ITEMS;
  const std::int64_t first =
      std::int64_t{blockIdx.x % p.segments} * p.steps * stride + threadIdx.x * ITEMS;
  Taps<1, WIDTH> taps;
  load_taps(p.in.weights, d, live ? 1 : 0, taps);
  float dweight[WIDTH] = {};
  float dbias = 0.0f;
  for (std::int64_t b = blockIdx.y; live && b < p.in.batch; b += gridDim.y) {
    for (std::int64_t i_step = 0; i_step < p.steps; ++i_step) {
      const std::int64_t t = first + i_step * stride;
      if (t >= length && t > 0) {
        break;
      }
      // Columns t - (W-1) to t + ITEMS + (W-1) of x, dout of those from t on.
      const int valid = static_cast<int>(min(length - t, std::int64_t{ITEMS}));
      const int valid_after =
          static_cast<int>(max(min(length - t - ITEMS, std::int64_t{4}), std::int64_t{0}));
      const Vector<T, ITEMS> own_x =
          load<ITEMS>(p.in.x.at(b, d, t), p.in.x.step, valid, p.in.x.vectorize);
      const Vector<T, ITEMS> own_dout =
          load<ITEMS>(p.dout.at(b, d, t), p.dout.step, valid, p.dout.vectorize);
      const Vector<T, 4> after_x =
          load<4>(p.in.x.at(b, d, t + ITEMS), p.in.x.step, valid_after, p.in.x.vectorize);
      const Vector<T, 4> after_dout =
          load<4>(p.dout.at(b, d, t + ITEMS), p.dout.step, valid_after, p.dout.vectorize);
      float halo[kHalo];
      load_halo<ITEMS>(p.in, b, d, t, halo);
      float x[kHalo + kSeen];
      float dp[kSeen];
#pragma unroll
      for (int i = 0; i < kHalo; ++i) {
        x[i] = halo[i];
        x[kHalo + ITEMS + i] = after_x[i];
        dp[ITEMS + i] = after_dout[i];
      }
#pragma unroll
      for (int i = 0; i < ITEMS; ++i) {
        x[kHalo + i] = own_x[i];
        dp[i] = own_dout[i];
      }
      float dx[ITEMS] = {};
      if (p.in.seq_idx == nullptr) {
        if (p.in.silu) {
#pragma unroll
          for (int i = 0; i < kSeen; ++i) {
            float pre = taps.bias[0];
#pragma unroll
            for (int w = 0; w < WIDTH; ++w) {
              pre = fmaf(taps.weight[w][0], x[i + w], pre);
            }
            dp[i] *= fast_silu_grad(pre);
          }
        }
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
          dbias += dp[i];
#pragma unroll
          for (int w = 0; w < WIDTH; ++w) {
            dweight[w] = fmaf(dp[i], x[i + w], dweight[w]);
            dx[i] = fmaf(taps.weight[w][0], dp[i + kHalo - w], dx[i]);
          }
        }
      } else {
        const Mask<kSeen, WIDTH> mask(p.in, b, t);
#pragma unroll
        for (int i = 0; i < kSeen; ++i) {
          if (p.in.silu) {
            float pre = taps.bias[0];
#pragma unroll
            for (int w = 0; w < WIDTH; ++w) {
              if (mask.sees(i, w)) {
                pre = fmaf(taps.weight[w][0], x[i + w], pre);
              }
            }
            dp[i] *= fast_silu_grad(pre);
          }
          dp[i] = mask.is_padding(i) ? 0.0f : dp[i];
        }
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
          dbias += dp[i];
#pragma unroll
          for (int w = 0; w < WIDTH; ++w) {
            if (mask.sees(i, w)) {
              dweight[w] = fmaf(dp[i], x[i + w], dweight[w]);
            }
            if (mask.sees(i + kHalo - w, w)) {
              dx[i] = fmaf(taps.weight[w][0], dp[i + kHalo - w], dx[i]);
            }
          }
        }
      }
      if (p.dfinal_states.data != nullptr && t + ITEMS > length - kHalo) {
        const std::int64_t first_final = length - kHalo;
        unsigned counted = 0;  // a bit for every step that is a final state
#pragma unroll 1
        for (int j = 0; j < kHalo; ++j) {
          const int at = static_cast<int>(first_final + j - t);
          if (at >= 0 && p.in.is_of_last_sequence(b, first_final + j)) {
            counted |= 1u << at;
          }
        }
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
          if ((counted >> i & 1) != 0) {
            dx[i] += mamba_native::cuda::as_float(*p.dfinal_states.at(b, d, t + i - first_final));
          }
        }
      }
      store<ITEMS>(p.dx.at(b, d, t), p.dx.step, valid, p.dx.vectorize, dx);
      if (p.dinitial_states.data != nullptr && t == 0) {
        if (p.in.seq_idx != nullptr) {  // only outputs of the first sequence saw the states
#pragma unroll
          for (int i = 1; i < kHalo; ++i) {
            dp[i] = p.in.seq(b, i) == p.in.seq(b, 0) ? dp[i] : 0.0f;
          }
        }
#pragma unroll
        for (int j = 0; j < kHalo; ++j) {
          float sum = 0.0f;
#pragma unroll
          for (int w = 0; w <= j; ++w) {
            sum = fmaf(taps.weight[w][0], dp[j - w], sum);
          }
          if (p.dfinal_states.data != nullptr && j >= length &&
              p.in.is_of_last_sequence(b, j - kHalo)) {
            sum += mamba_native::cuda::as_float(*p.dfinal_states.at(b, d, j - length));
          }
          *p.dinitial_states.at(b, d, j) = mamba_native::cuda::from_float<T>(sum);
        }
      }
    }
  }
  // The lanes of a channel are neighbours in one warp; every thread of the block is here.
  for (unsigned offset = blockDim.x / 2; offset > 0; offset /= 2) {
    dbias += __shfl_xor_sync(0xffffffffu, dbias, offset);
#pragma unroll
    for (int w = 0; w < WIDTH; ++w) {
      dweight[w] += __shfl_xor_sync(0xffffffffu, dweight[w], offset);
    }
  }
  if (live && threadIdx.x == 0) {
    float* const shares = p.shares_of(p.dweight) + d * WIDTH;
#pragma unroll
    for (int w = 0; w < WIDTH; ++w) {
      p.add(shares + w, dweight[w]);
    }
    if (p.dbias != nullptr) {
      p.add(p.shares_of(p.dbias) + d, dbias);
    }
  }
}

// What a thread of backward_along_channels carries from step to step: the last W-1 columns of x and
// the gradients of those columns as far as they are known, oldest first; and its sums.
template <int CHANNELS, int WIDTH>
struct BackwardState {
  float x[WIDTH - 1][CHANNELS];
  float dx[WIDTH - 1][CHANNELS];
  int seq[WIDTH - 1];
  float dweight[WIDTH][CHANNELS];
  float dbias[CHANNELS];
};

// ROWS steps of `valid` channels from (d, t) on, of which `readable` exist: none beyond the
// sequence. `owned`: they count in the thread's sums. dx is stored for the columns from `first` on.
template <int ROWS, class T, int WIDTH, int CHANNELS>
__device__ __forceinline__ void backward_rows(const DeviceBackward<T>& p,
                                              const Taps<CHANNELS, WIDTH>& taps, std::int64_t b,
                                              std::int64_t d, std::int64_t t, int valid,
                                              int readable, bool vectors, bool owned,
                                              std::int64_t first,
                                              BackwardState<CHANNELS, WIDTH>& state) {
  constexpr int kHalo = WIDTH - 1;
  const int first_tap = p.in.template first_tap<WIDTH>();
  Vector<T, CHANNELS> x_rows[ROWS];
  Vector<T, CHANNELS> dout_rows[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    x_rows[r] = load<CHANNELS>(p.in.x.at(b, d, t + r), p.in.x.channel, readable, vectors);
    dout_rows[r] = load<CHANNELS>(p.dout.at(b, d, t + r), p.dout.channel, readable, vectors);
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int seq = p.in.seq_idx == nullptr ? 0 : p.in.seq(b, t + r);
    bool sees[WIDTH];
#pragma unroll
    for (int w = 0; w < kHalo; ++w) {
      sees[w] = w >= first_tap && seq >= 0 && state.seq[w] == seq;
    }
    sees[kHalo] = seq >= 0;  // padding sees nothing, not even itself
    float dp[CHANNELS];
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      dp[c] = dout_rows[r][c];
    }
    if (p.in.silu) {
      float pre[CHANNELS];
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        pre[c] = fmaf(taps.weight[kHalo][c], x_rows[r][c], taps.bias[c]);
      }
#pragma unroll
      for (int w = 0; w < kHalo; ++w) {
        if (sees[w]) {
#pragma unroll
          for (int c = 0; c < CHANNELS; ++c) {
            pre[c] = fmaf(taps.weight[w][c], state.x[w][c], pre[c]);
          }
        }
      }
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        dp[c] *= fast_silu_grad(pre[c]);
      }
    }
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      dp[c] = seq < 0 ? 0.0f : dp[c];
    }
    if (owned) {
#pragma unroll
      for (int w = 0; w < WIDTH; ++w) {
        if (sees[w]) {
#pragma unroll
          for (int c = 0; c < CHANNELS; ++c) {
            state.dweight[w][c] =
                fmaf(dp[c], w < kHalo ? state.x[w < kHalo ? w : 0][c] : x_rows[r][c],
                     state.dweight[w][c]);
          }
        }
      }
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        state.dbias[c] += dp[c];
      }
    }
    float dx[CHANNELS];  // of column t + r - (W-1), complete with this step
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      dx[c] = state.dx[0][c];
#pragma unroll
      for (int i = 0; i < kHalo; ++i) {
        state.dx[i][c] = i + 1 < kHalo ? state.dx[i + 1 < kHalo ? i + 1 : 0][c] : 0.0f;
        state.x[i][c] = i + 1 < kHalo ? state.x[i + 1 < kHalo ? i + 1 : 0][c] : x_rows[r][c];
      }
    }
#pragma unroll
    for (int w = 0; w < WIDTH; ++w) {
      if (sees[w]) {
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
          float& to = w == 0 ? dx[c] : state.dx[w == 0 ? 0 : w - 1][c];
          to = fmaf(taps.weight[w][c], dp[c], to);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kHalo; ++i) {
      state.seq[i] = i + 1 < kHalo ? state.seq[i + 1 < kHalo ? i + 1 : 0] : seq;
    }

    const std::int64_t column = t + r - kHalo;
    if (column < first && first > 0) {
      continue;  // the previous thread's
    }
    const int states = kHalo - first_tap;
    if constexpr (ROWS == 1) {  // final states are columns that steps beyond the sequence complete
      const std::int64_t final_column = column - (p.in.length - states);
      if (p.dfinal_states.data != nullptr && final_column >= 0 &&
          p.in.is_of_last_sequence(b, column)) {
        const Vector<T, CHANNELS> extra = load_elements<CHANNELS>(
            p.dfinal_states.at(b, d, final_column), p.dfinal_states.channel, valid);
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
          dx[c] += extra[c];
        }
      }
    }
    if (column >= 0) {
      store<CHANNELS>(p.dx.at(b, d, column), p.dx.channel, valid, vectors, dx);
    } else if (p.dinitial_states.data != nullptr && column + states >= 0) {
      store<CHANNELS>(p.dinitial_states.at(b, d, column + states), p.dinitial_states.channel, valid,
                      false, dx);
    }
  }
}

template <class T, int WIDTH, int CHANNELS>
__global__ void __launch_bounds__(kMaxThreads) backward_along_channels(const DeviceBackward<T> p) {
  constexpr int kHalo = WIDTH - 1;
  constexpr int kRows = WIDTH == kMaxWidth ? 2 : 4;
  constexpr int kSums = CHANNELS * (WIDTH + 1);
  __shared__ float shared_sums[kSums][kMaxThreads + 1];  // the odd pitch spreads over the banks
  const std::int64_t length = p.in.length;
  const std::int64_t block_channel = std::int64_t{blockIdx.x / p.segments} * blockDim.x * CHANNELS;
  const std::int64_t d = block_channel + threadIdx.x * CHANNELS;
  const std::int64_t first =
      (std::int64_t{blockIdx.x % p.segments} * blockDim.y + threadIdx.y) * p.steps;
  const bool live = d < p.in.channels && (first < length || first == 0);
  const int valid = static_cast<int>(min(p.in.channels - d, std::int64_t{CHANNELS}));
  const std::int64_t end = min(first + p.steps, length);
  const bool vectors = p.in.x.vectorize && p.dout.vectorize && p.dx.vectorize && valid == CHANNELS;
  Taps<CHANNELS, WIDTH> taps;
  load_taps(p.in.weights, d, live ? valid : 0, taps);
  BackwardState<CHANNELS, WIDTH> state;
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    state.dbias[c] = 0.0f;
#pragma unroll
    for (int w = 0; w < WIDTH; ++w) {
      state.dweight[w][c] = 0.0f;
    }
  }
  for (std::int64_t b = blockIdx.y; live && b < p.in.batch; b += gridDim.y) {
#pragma unroll
    for (int i = 0; i < kHalo; ++i) {
      const Vector<T, CHANNELS> column =
          load_column<CHANNELS, WIDTH>(p.in, b, d, first - kHalo + i, valid);
      state.seq[i] = p.in.seq_idx == nullptr ? 0 : p.in.seq(b, first - kHalo + i);
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        state.x[i][c] = column[c];
        state.dx[i][c] = 0.0f;
      }
    }
    std::int64_t t = first;
    for (; vectors && t + kRows <= end; t += kRows) {
      backward_rows<kRows>(p, taps, b, d, t, CHANNELS, CHANNELS, true, true, first, state);
    }
    // The rest, the W-1 steps beyond that reach into the thread's last columns, and what cannot be
    // vectors: a row at a time.
    for (; t < end + kHalo; ++t) {
      backward_rows<1>(p, taps, b, d, t, valid, t < length ? valid : 0, vectors, t < end, first,
                       state);
    }
  }

  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
#pragma unroll
    for (int w = 0; w < WIDTH; ++w) {
      shared_sums[c * WIDTH + w][thread] = state.dweight[w][c];
    }
    shared_sums[CHANNELS * WIDTH + c][thread] = state.dbias[c];
  }
  __syncthreads();
  // Neighbouring threads add neighbouring addresses of dweight.
  const int lanes = static_cast<int>(blockDim.x);
  const int threads = lanes * static_cast<int>(blockDim.y);
  const int first_tap = p.in.template first_tap<WIDTH>();
  float* const dweight = p.shares_of(p.dweight) + block_channel * (WIDTH - first_tap);
  for (int i = thread; i < lanes * CHANNELS * WIDTH; i += threads) {
    const int lane = i / (CHANNELS * WIDTH);
    const int tap = i % WIDTH - first_tap;
    float sum = 0.0f;
    for (int from = lane; from < threads; from += lanes) {
      sum += shared_sums[i % (CHANNELS * WIDTH)][from];
    }
    if (tap >= 0 && block_channel + i / WIDTH < p.in.channels) {
      p.add(dweight + i / WIDTH * (WIDTH - first_tap) + tap, sum);
    }
  }
  for (int i = thread; p.dbias != nullptr && i < lanes * CHANNELS; i += threads) {
    float sum = 0.0f;
    for (int from = i / CHANNELS; from < threads; from += lanes) {
      sum += shared_sums[CHANNELS * WIDTH + i % CHANNELS][from];
    }
    if (block_channel + i < p.in.channels) {
      p.add(p.shares_of(p.dbias) + block_channel + i, sum);
    }
  }
}

template <class T, int ROW, int WIDTH>
void launch_backward(const DeviceBackward<T>& p, dim3 grid, dim3 block, cudaStream_t stream) {
  constexpr Config kConfig = kBackwardConfigs[ROW];
  constexpr int kItems = kConfig.items(sizeof(T));
  constexpr int kWidth = kernel_width(kConfig, WIDTH);
  if constexpr (kConfig.axis == Axis::time) {
    backward_along_time<T, kWidth, kItems><<<grid, block, 0, stream>>>(p);
  } else {
    backward_along_channels<T, kWidth, kItems><<<grid, block, 0, stream>>>(p);
  }
  MAMBA_CUDA_CHECK_LAUNCH();
}

template <class T>
using BackwardLauncher = void (*)(const DeviceBackward<T>&, dim3, dim3, cudaStream_t);

template <class T, int... ROWS>
BackwardLauncher<T> backward_launcher(int row, std::int64_t width,
                                      std::integer_sequence<int, ROWS...>) {
  static constexpr BackwardLauncher<T> kTable[][3] = {
      {launch_backward<T, ROWS, 2>, launch_backward<T, ROWS, 3>, launch_backward<T, ROWS, 4>}...};
  return kTable[row][kBackwardConfigs[row].any_width ? 0 : width - 2];
}

template <class Host>
void backward(const BackwardParams& params, const Plan& plan) {
  using T = mamba_native::cuda::DeviceType<Host>;
  const cudaStream_t stream = static_cast<cudaStream_t>(params.stream);
  const Config& config = kBackwardConfigs[plan.config];
  DeviceBackward<T> p;
  p.in = device_inputs<T>(params.in, config);
  p.dout = sequence<const T>(params.dout, config);
  p.dfinal_states = sequence<const T>(params.dfinal_states, config);
  p.dx = sequence<T>(params.dx, config);
  p.dinitial_states = sequence<T>(params.dinitial_states, config);
  p.dweight = params.dweight.as<float>();
  p.dbias = params.dbias.present() ? params.dbias.as<float>() : nullptr;
  p.workspace = 0;
  p.segments = static_cast<unsigned>(plan.segments);
  p.steps = plan.steps;
  const std::int64_t weights = params.dweight.numel();
  const bool ordered = params.workspace.present() && p.in.batch > 0;
  if (ordered) {
    p.dweight = params.workspace.as<float>();
    p.dbias = p.dbias != nullptr ? p.dweight + weights : nullptr;
    p.workspace = weights + p.in.channels;
  } else {
    MAMBA_CUDA_CHECK(
        cudaMemsetAsync(p.dweight, 0, static_cast<std::size_t>(weights) * sizeof(float), stream));
    if (p.dbias != nullptr) {
      MAMBA_CUDA_CHECK(cudaMemsetAsync(
          p.dbias, 0, static_cast<std::size_t>(p.in.channels) * sizeof(float), stream));
    }
  }
  if (p.in.batch == 0) {
    return;
  }
  const dim3 grid(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.batches));
  const dim3 block(static_cast<unsigned>(plan.lanes), static_cast<unsigned>(plan.groups));
  backward_launcher<T>(plan.config, params.in.weight.size[1],
                       std::make_integer_sequence<int, kBackwardConfigCount>())(p, grid, block,
                                                                                stream);
  if (ordered) {
    mamba_native::cuda::OrderedSums sums;
    sums.of[0] = {p.dweight, params.dweight.as<float>(), weights};
    sums.of[1] = {p.dbias, params.dbias.as<float>(), p.in.channels};
    mamba_native::cuda::add_in_order(sums, plan.segments * plan.batches, p.workspace, stream);
  }
}

}  // namespace mamba_native::causal_conv1d::cuda
