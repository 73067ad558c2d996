// Forward convolution on CUDA, without shared memory and without barriers.
//
//   p[t] = bias + sum_w weight[w] x[t - (W-1-w)];   out = silu(p) or p
//
// Two mappings, one for each way that neighbours in memory can be neighbours in the tensor:
//
//   along_time      channel-first. A thread computes ITEMS steps of one channel from one vector of
//                   them and the four steps before it, which its neighbour loads too: L1 hits.
//                   blockDim = (lanes along time, channels)
//   along_channels  channel-last. A thread computes CHANNELS channels and slides over `steps` steps
//                   with the last W-1 columns in registers, ROWS loads in flight.
//                   blockDim = (lanes along channels, segments of time)
//
//   grid.x = (block of channels, block along time), grid.y = batch; both kernels take any strides.
//   WIDTH = kMaxWidth stands for any width up to that, with the oldest taps missing.
#pragma once

#include <utility>

#include "causal_conv1d/tensors.cuh"
#include "core/cuda/launch.h"

namespace mamba_native::causal_conv1d::cuda {

template <class T>
struct DeviceForward {
  DeviceInputs<T> in;
  Sequence<T> out, final_states;
  unsigned segments;   // thread blocks along time
  std::int64_t steps;  // along_channels: of a thread
};

// The last W-1 columns of [initial_states, x] for channels [d, d + count), those of other sequences
// than the last being 0; one thread does them.
template <int WIDTH, class T>
__device__ __forceinline__ void write_final_states(const DeviceForward<T>& p, std::int64_t b,
                                                   std::int64_t d, int count) {
  const int states = WIDTH - 1 - p.in.template first_tap<WIDTH>();
  for (int c = 0; c < count; ++c) {
    for (int j = 0; j < states; ++j) {
      const std::int64_t t = p.in.length - states + j;
      const bool counts = p.in.is_of_last_sequence(b, t);
      float column = 0.0f;
      if (counts && t >= 0) {
        column = mamba_native::cuda::as_float(*p.in.x.at(b, d + c, t));
      } else if (counts && p.in.initial_states.data != nullptr) {
        column = mamba_native::cuda::as_float(*p.in.initial_states.at(b, d + c, t + states));
      }
      *p.final_states.at(b, d + c, j) = mamba_native::cuda::from_float<T>(column);
    }
  }
}

template <class T, int WIDTH, int ITEMS>
__global__ void __launch_bounds__(kMaxThreads) forward_along_time(const DeviceForward<T> p) {
  constexpr int kHalo = WIDTH - 1;
  const std::int64_t d = std::int64_t{blockIdx.x / p.segments} * blockDim.y + threadIdx.y;
  const std::int64_t t = (std::int64_t{blockIdx.x % p.segments} * blockDim.x + threadIdx.x) * ITEMS;
  if (d >= p.in.channels || (t >= p.in.length && t > 0)) {
    return;
  }
  const int valid = static_cast<int>(min(p.in.length - t, std::int64_t{ITEMS}));
  Taps<1, WIDTH> taps;
  load_taps(p.in.weights, d, 1, taps);
  for (std::int64_t b = blockIdx.y; b < p.in.batch; b += gridDim.y) {
    const Vector<T, ITEMS> own =
        load<ITEMS>(p.in.x.at(b, d, t), p.in.x.step, valid, p.in.x.vectorize);
    float halo[kHalo];
    load_halo<ITEMS>(p.in, b, d, t, halo);
    float x[kHalo + ITEMS];
#pragma unroll
    for (int i = 0; i < kHalo + ITEMS; ++i) {
      x[i] = i < kHalo ? halo[i < kHalo ? i : 0] : own[i - kHalo];
    }
    float out[ITEMS];
    if (p.in.seq_idx == nullptr) {
#pragma unroll
      for (int i = 0; i < ITEMS; ++i) {
        out[i] = taps.bias[0];
#pragma unroll
        for (int w = 0; w < WIDTH; ++w) {
          out[i] = fmaf(taps.weight[w][0], x[i + w], out[i]);
        }
      }
    } else {
      const Mask<ITEMS, WIDTH> mask(p.in, b, t);
#pragma unroll
      for (int i = 0; i < ITEMS; ++i) {
        out[i] = taps.bias[0];
#pragma unroll
        for (int w = 0; w < WIDTH; ++w) {
          if (mask.sees(i, w)) {
            out[i] = fmaf(taps.weight[w][0], x[i + w], out[i]);
          }
        }
        out[i] = mask.is_padding(i) ? 0.0f : out[i];  // and silu(0) = 0
      }
    }
    if (p.in.silu) {
#pragma unroll
      for (int i = 0; i < ITEMS; ++i) {
        out[i] = fast_silu(out[i]);
      }
    }
    store<ITEMS>(p.out.at(b, d, t), p.out.step, valid, p.out.vectorize, out);
    if (p.final_states.data != nullptr && t + ITEMS >= p.in.length) {
      write_final_states<WIDTH>(p, b, d, 1);
    }
  }
}

// The last W-1 columns that a thread of forward_along_channels has passed, oldest first.
template <int CHANNELS, int HALO>
struct Window {
  float x[HALO][CHANNELS];
  int seq[HALO];
};

// ROWS steps of `valid` channels from (d, t) on.
template <int ROWS, class T, int WIDTH, int CHANNELS>
__device__ __forceinline__ void forward_rows(const DeviceForward<T>& p,
                                             const Taps<CHANNELS, WIDTH>& taps, std::int64_t b,
                                             std::int64_t d, std::int64_t t, int valid,
                                             bool vectors, Window<CHANNELS, WIDTH - 1>& window) {
  constexpr int kHalo = WIDTH - 1;
  const int first_tap = p.in.template first_tap<WIDTH>();
  Vector<T, CHANNELS> rows[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    rows[r] = load<CHANNELS>(p.in.x.at(b, d, t + r), p.in.x.channel, valid, vectors);
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int seq = p.in.seq_idx == nullptr ? 0 : p.in.seq(b, t + r);
    float out[CHANNELS];
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      out[c] = taps.bias[c];
    }
#pragma unroll
    for (int w = 0; w < kHalo; ++w) {
      if (w >= first_tap && window.seq[w] == seq) {
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
          out[c] = fmaf(taps.weight[w][c], window.x[w][c], out[c]);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const float x = rows[r][c];
      out[c] = fmaf(taps.weight[kHalo][c], x, out[c]);
      out[c] = seq < 0 ? 0.0f : out[c];  // and silu(0) = 0
#pragma unroll
      for (int i = 0; i + 1 < kHalo; ++i) {
        window.x[i][c] = window.x[i + 1][c];
      }
      window.x[kHalo - 1][c] = x;
    }
#pragma unroll
    for (int i = 0; i + 1 < kHalo; ++i) {
      window.seq[i] = window.seq[i + 1];
    }
    window.seq[kHalo - 1] = seq;
    if (p.in.silu) {
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        out[c] = fast_silu(out[c]);
      }
    }
    store<CHANNELS>(p.out.at(b, d, t + r), p.out.channel, valid, vectors, out);
  }
}

template <int CHANNELS>
inline constexpr int kForwardBlocks = CHANNELS >= 8 ? 4 : 5;  // per multiprocessor

template <class T, int WIDTH, int CHANNELS>
__global__ void __launch_bounds__(kMaxThreads, kForwardBlocks<CHANNELS>)
    forward_along_channels(const DeviceForward<T> p) {
  constexpr int kHalo = WIDTH - 1;
  constexpr int kRows = CHANNELS >= 8 ? 3 : WIDTH == kMaxWidth ? 2 : 4;
  const std::int64_t d =
      (std::int64_t{blockIdx.x / p.segments} * blockDim.x + threadIdx.x) * CHANNELS;
  const std::int64_t first =
      (std::int64_t{blockIdx.x % p.segments} * blockDim.y + threadIdx.y) * p.steps;
  if (d >= p.in.channels || (first >= p.in.length && first > 0)) {
    return;
  }
  const int valid = static_cast<int>(min(p.in.channels - d, std::int64_t{CHANNELS}));
  const std::int64_t end = min(first + p.steps, p.in.length);
  const bool vectors = p.in.x.vectorize && p.out.vectorize && valid == CHANNELS;
  Taps<CHANNELS, WIDTH> taps;
  load_taps(p.in.weights, d, valid, taps);
  for (std::int64_t b = blockIdx.y; b < p.in.batch; b += gridDim.y) {
    Window<CHANNELS, kHalo> window;
#pragma unroll
    for (int i = 0; i < kHalo; ++i) {
      const Vector<T, CHANNELS> column =
          load_column<CHANNELS, WIDTH>(p.in, b, d, first - kHalo + i, valid);
      window.seq[i] = p.in.seq_idx == nullptr ? 0 : p.in.seq(b, first - kHalo + i);
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        window.x[i][c] = column[c];
      }
    }
    std::int64_t t = first;
    for (; vectors && t + kRows <= end; t += kRows) {
      forward_rows<kRows>(p, taps, b, d, t, CHANNELS, true, window);
    }
    // The rest, and what cannot be vectors: a row at a time, since single elements of many rows
    // would take the registers that decide the occupancy.
    for (; t < end; ++t) {
      forward_rows<1>(p, taps, b, d, t, valid, vectors, window);
    }
    if (p.final_states.data != nullptr && end == p.in.length) {
      write_final_states<WIDTH>(p, b, d, valid);
    }
  }
}

template <class T, int ROW, int WIDTH>
void launch_forward(const DeviceForward<T>& p, dim3 grid, dim3 block, cudaStream_t stream) {
  constexpr Config kConfig = kForwardConfigs[ROW];
  constexpr int kItems = kConfig.items(sizeof(T));
  constexpr int kWidth = kernel_width(kConfig, WIDTH);
  if constexpr (kConfig.axis == Axis::time) {
    forward_along_time<T, kWidth, kItems><<<grid, block, 0, stream>>>(p);
  } else {
    forward_along_channels<T, kWidth, kItems><<<grid, block, 0, stream>>>(p);
  }
  MAMBA_CUDA_CHECK_LAUNCH();
}

template <class T>
using ForwardLauncher = void (*)(const DeviceForward<T>&, dim3, dim3, cudaStream_t);

template <class T, int... ROWS>
ForwardLauncher<T> forward_launcher(int row, std::int64_t width,
                                    std::integer_sequence<int, ROWS...>) {
  static constexpr ForwardLauncher<T> kTable[][3] = {
      {launch_forward<T, ROWS, 2>, launch_forward<T, ROWS, 3>, launch_forward<T, ROWS, 4>}...};
  return kTable[row][kForwardConfigs[row].any_width ? 0 : width - 2];
}

template <class Host>
void forward(const ForwardParams& params, const Plan& plan) {
  using T = mamba_native::cuda::DeviceType<Host>;
  const Config& config = kForwardConfigs[plan.config];
  DeviceForward<T> p;
  p.in = device_inputs<T>(params.in, config);
  p.out = sequence<T>(params.out, config);
  p.final_states = sequence<T>(params.final_states, config);
  p.segments = static_cast<unsigned>(plan.segments);
  p.steps = plan.steps;
  const dim3 grid(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.batches));
  const dim3 block(static_cast<unsigned>(plan.lanes), static_cast<unsigned>(plan.groups));
  forward_launcher<T>(plan.config, params.in.weight.size[1],
                      std::make_integer_sequence<int, kForwardConfigCount>())(
      p, grid, block, static_cast<cudaStream_t>(params.stream));
}

}  // namespace mamba_native::causal_conv1d::cuda
