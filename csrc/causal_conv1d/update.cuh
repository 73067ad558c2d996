// A decode step on CUDA: copies with a little arithmetic.
#pragma once

#include "causal_conv1d/tensors.cuh"
#include "core/cuda/launch.h"
#include "core/error.h"
#include "core/math.h"

namespace mamba_native::causal_conv1d::cuda {

inline constexpr int kUpdateThreads = 64;

template <class T>
struct DeviceUpdate {
  std::int64_t batch, channels, tokens, rows, state_len;
  Sequence<const T> x;
  Sequence<T> state, out;
  Weights weights;
  const std::int32_t* cache_seqlens;  // or null: a linear buffer
  const std::int32_t* indices;        // or null: row b
  std::int64_t cache_seqlens_step, indices_step;
  bool silu;
};

// One thread per channel and sequence, so that a row of the buffer has one owner.
// grid = (blocks of channels, sequences).
//
//   v = [context, x];  out[i] = act(bias + sum_w weight[w] v[i + w]);  then x enters the buffer
//
// WIDTH is the largest width that it takes; the oldest taps of a narrower weight are missing. The
// context and the first token are loaded before anything is stored.
template <class T, int WIDTH>
__global__ void __launch_bounds__(kUpdateThreads) update_kernel(const DeviceUpdate<T> p) {
  constexpr int kHalo = WIDTH - 1;
  constexpr int kMove = 4;  // columns of a linear buffer that move at once
  const int first_tap = p.weights.first_tap;
  const std::int64_t d = std::int64_t{blockIdx.x} * kUpdateThreads + threadIdx.x;
  if (d >= p.channels) {
    return;
  }
  Taps<1, WIDTH> taps;
  load_taps(p.weights, d, 1, taps);
  for (std::int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const std::int64_t row = p.indices == nullptr ? b : p.indices[b * p.indices_step];
    if (row < 0 || row >= p.rows) {
      // Padding; or a row that does not exist, which must show but must not be touched.
      const float filler = row < 0 ? 0.0f : __uint_as_float(0x7fffffffu);
      for (std::int64_t i = 0; i < p.tokens; ++i) {
        *p.out.at(b, d, i) = mamba_native::cuda::from_float<T>(filler);
      }
      continue;
    }
    // Where token 0 is stored in a circular buffer; any number is taken modulo its length.
    std::int64_t start = 0;
    if (p.cache_seqlens != nullptr) {
      start = p.cache_seqlens[b * p.cache_seqlens_step] % p.state_len;
      start = start < 0 ? start + p.state_len : start;
    }
    float window[WIDTH];
#pragma unroll
    for (int j = 0; j < kHalo; ++j) {
      std::int64_t column = start - kHalo + j;  // a linear buffer ends with the newest column
      column = column < 0 ? column + p.state_len : column;
      window[j] = j < first_tap ? 0.0f : mamba_native::cuda::as_float(*p.state.at(row, d, column));
    }
    T next = *p.x.at(b, d, 0);
    if (p.cache_seqlens == nullptr) {
      const std::int64_t kept = p.tokens < p.state_len ? p.state_len - p.tokens : 0;
#pragma unroll 1
      for (std::int64_t j = 0; j < kept; j += kMove) {
        T columns[kMove];
#pragma unroll
        for (int i = 0; i < kMove; ++i) {
          if (j + i < kept) {
            columns[i] = *p.state.at(row, d, j + i + p.tokens);
          }
        }
#pragma unroll
        for (int i = 0; i < kMove; ++i) {
          if (j + i < kept) {
            *p.state.at(row, d, j + i) = columns[i];
          }
        }
      }
    }
    std::int64_t slot = p.cache_seqlens == nullptr ? p.state_len - p.tokens : start;
#pragma unroll 1
    for (std::int64_t i = 0; i < p.tokens; ++i) {
      const T token = next;
      if (i + 1 < p.tokens) {
        next = *p.x.at(b, d, i + 1);
      }
      window[kHalo] = mamba_native::cuda::as_float(token);
      float out = taps.bias[0];
#pragma unroll
      for (int w = 0; w < WIDTH; ++w) {
        if (w >= first_tap) {
          out = fmaf(taps.weight[w][0], window[w], out);
        }
      }
#pragma unroll
      for (int w = 0; w < kHalo; ++w) {
        window[w] = window[w + 1];
      }
      if (slot >= 0) {  // of more tokens than columns, a linear buffer keeps the last
        *p.state.at(row, d, slot) = token;
      }
      ++slot;
      if (slot == p.state_len) {
        slot = 0;
      }
      *p.out.at(b, d, i) = mamba_native::cuda::from_float<T>(p.silu ? fast_silu(out) : out);
    }
  }
}

template <class T, int WIDTH>
void launch_update(DeviceUpdate<T> p, const UpdateParams& params, dim3 grid) {
  p.weights = weights(params.weight, params.bias, WIDTH);
  update_kernel<T, WIDTH><<<grid, kUpdateThreads, 0, static_cast<cudaStream_t>(params.stream)>>>(p);
  MAMBA_CUDA_CHECK_LAUNCH();
}

template <class Host>
void update(const UpdateParams& params) {
  using T = mamba_native::cuda::DeviceType<Host>;
  constexpr Config kElements{Axis::channels, 1, 1};
  DeviceUpdate<T> p;
  p.batch = params.x.size[0];
  p.channels = params.x.size[1];
  p.tokens = params.x.size[2];
  p.rows = params.conv_state.size[0];
  p.state_len = params.conv_state.size[2];
  p.x = sequence<const T>(params.x, kElements);
  p.state = sequence<T>(params.conv_state, kElements);
  p.out = sequence<T>(params.out, kElements);
  p.cache_seqlens = params.cache_seqlens.present()
                        ? static_cast<const std::int32_t*>(params.cache_seqlens.data)
                        : nullptr;
  p.cache_seqlens_step = params.cache_seqlens.stride[0];
  p.indices = params.conv_state_indices.present()
                  ? static_cast<const std::int32_t*>(params.conv_state_indices.data)
                  : nullptr;
  p.indices_step = params.conv_state_indices.stride[0];
  p.silu = params.silu;
  const std::int64_t blocks = ceil_div(p.channels, kUpdateThreads);
  MAMBA_CHECK(blocks <= 0x7fffffff, "causal_conv1d_update: too many channels: ", p.channels);
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>(p.batch < kMaxGridY ? p.batch : kMaxGridY));
  if (params.weight.size[1] <= kWidestOwnKernel) {
    launch_update<T, kWidestOwnKernel>(p, params, grid);
  } else {
    launch_update<T, kMaxWidth>(p, params, grid);
  }
}

}  // namespace mamba_native::causal_conv1d::cuda
