// LayerNorm and RMSNorm with residual addition on CUDA, forward.
//
//   h = x + residual,  y = (h - mean) rstd weight + bias,  rstd = (mean((h - mean)^2) + eps)^-1/2
//   (RMSNorm: mean = 0)
//
// Every element is read and written once and hardly computed with, so memory bandwidth decides:
//
//   grid.x   groups of blockDim.y rows (more rows than blocks: striding)
//   block    (threads of a row, rows); thread t of a row owns the vectors t, t + blockDim.x, ...
//            of kVector elements, so that a warp's loads are adjacent, and keeps h in registers
//
// The variance is the mean square of the centred values, computed from registers: no cancellation.
#pragma once

#include <array>
#include <utility>

#include "layer_norm/rows.cuh"

namespace mamba_native::layer_norm::cuda {

struct Forward {
  Rows x;             // (M, N) T
  Rows weight;        // (N)
  Rows bias;          // (N), optional
  Rows residual;      // (M, N), optional
  Rows y;             // (M, N) T
  Rows residual_out;  // (M, N), optional
  float* mean;        // (M), null for RMS
  float* rstd;        // (M)
  std::int64_t rows;
  int features;
  float eps;
  bool is_rms_norm;
};

// The next kVector elements of h from a vector of x and one of the residual.
template <class T>
__device__ __forceinline__ void add_residual(const Forward& p, const Vector& x,
                                             const Vector& residual, float (&h)[kVector]) {
  to_floats(x, kDTypeOf<T>, h);
  if (p.residual.data != nullptr) {
    float r[kVector];
    to_floats(residual, p.residual.dtype, r);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      h[i] += r[i];
    }
  }
}

template <class T, bool WHOLE>
__device__ __forceinline__ void store_normalised(const Forward& p, std::int64_t row, int column,
                                                 float mean, float rstd,
                                                 const float (&h)[kVector]) {
  float y[kVector];
  float weight[kVector];
  to_floats(load_vector<WHOLE>(p.weight, p.weight.dtype, 0, column, p.features), p.weight.dtype,
            weight);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    y[i] = (h[i] - mean) * rstd * weight[i];
  }
  if (p.bias.data != nullptr) {
    float bias[kVector];
    to_floats(load_vector<WHOLE>(p.bias, p.bias.dtype, 0, column, p.features), p.bias.dtype, bias);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      y[i] += bias[i];
    }
  }
  store_vector<WHOLE>(p.y, kDTypeOf<T>, row, column, p.features, y);
}

__device__ __forceinline__ void store_statistics(const Forward& p, std::int64_t row, float mean,
                                                 float rstd) {
  if (threadIdx.x == 0) {
    p.rstd[row] = rstd;
    if (!p.is_rms_norm) {
      p.mean[row] = mean;
    }
  }
}

// Everything moves as vectors.
template <class T, int VECTORS, int THREADS>
__global__ void __launch_bounds__(THREADS) forward_kernel(const Forward p) {
  __shared__ float slots[RowSum<1>::kSlots];
  RowSum<1> row_sum(slots);
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.y;
  for (std::int64_t first = std::int64_t{blockIdx.x} * blockDim.y; first < p.rows; first += step) {
    const std::int64_t row = first + threadIdx.y;
    const bool active = row < p.rows;  // rows beyond the end still meet at the barriers
    const int features = active ? p.features : 0;

    // 1. h, with the loads of up to four vectors of each tensor under way together.
    constexpr int kGroup = VECTORS < 4 ? VECTORS : 4;
    float h[VECTORS][kVector];
#pragma unroll
    for (int group = 0; group < VECTORS; group += kGroup) {
      Vector x[kGroup];
      Vector residual[kGroup];
#pragma unroll
      for (int v = 0; v < kGroup; ++v) {
        x[v] = load_vector<true>(p.x, kDTypeOf<T>, row, column_of(group + v), features);
      }
      if (p.residual.data != nullptr) {
#pragma unroll
        for (int v = 0; v < kGroup; ++v) {
          residual[v] =
              load_vector<true>(p.residual, p.residual.dtype, row, column_of(group + v), features);
        }
      }
#pragma unroll
      for (int v = 0; v < kGroup; ++v) {
        add_residual<T>(p, x[v], residual[v], h[group + v]);
      }
    }
    if (p.residual_out.data != nullptr) {
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        const int column = column_of(v);
        store_vector<true>(p.residual_out, p.residual_out.dtype, row, column, features, h[v]);
      }
    }

    // 2. Mean, then variance. Columns beyond the row hold zeros.
    float mean = 0.0f;
    if (!p.is_rms_norm) {
      float sum[1] = {0.0f};
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        sum[0] += (h[v][0] + h[v][1]) + (h[v][2] + h[v][3]);
      }
      row_sum(sum);
      mean = sum[0] / static_cast<float>(p.features);
    }
    float squares[1] = {0.0f};
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      const int column = column_of(v);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float centred = column < features ? h[v][i] - mean : 0.0f;
        squares[0] = fmaf(centred, centred, squares[0]);
      }
    }
    row_sum(squares);
    const float rstd = 1.0f / sqrtf(squares[0] / static_cast<float>(p.features) + p.eps);

    // 3. Output.
    if (active) {
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        const int column = column_of(v);
        store_normalised<T, true>(p, row, column, mean, rstd, h[v]);
      }
      store_statistics(p, row, mean, rstd);
    }
  }
}

// Rows of any width, strides and alignment: the block walks each row three times (twice for
// RMSNorm); after the first, most of it comes from the L2 cache.
template <class T, int THREADS>
__global__ void __launch_bounds__(THREADS) forward_kernel_any(const Forward p) {
  __shared__ float slots[RowSum<1>::kSlots];
  RowSum<1> row_sum(slots);
  const int step = static_cast<int>(blockDim.x) * kVector;
  for (std::int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    float mean = 0.0f;
    float rstd = 0.0f;
    for (int pass = p.is_rms_norm ? 1 : 0; pass < 3; ++pass) {
      float sum[1] = {0.0f};
      for (int column = static_cast<int>(threadIdx.x) * kVector; column < p.features;
           column += step) {
        const Vector x = load_vector<false>(p.x, kDTypeOf<T>, row, column, p.features);
        Vector residual;
        if (p.residual.data != nullptr) {
          residual = load_vector<false>(p.residual, p.residual.dtype, row, column, p.features);
        }
        float h[kVector];
        add_residual<T>(p, x, residual, h);
        if (pass == 2) {
          if (p.residual_out.data != nullptr) {
            store_vector<false>(p.residual_out, p.residual_out.dtype, row, column, p.features, h);
          }
          store_normalised<T, false>(p, row, column, mean, rstd, h);
          continue;
        }
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const float centred = column + i < p.features ? h[i] - mean : 0.0f;
          sum[0] += pass == 0 ? centred : centred * centred;
        }
      }
      if (pass < 2) {
        row_sum(sum);
        const float average = sum[0] / static_cast<float>(p.features);
        if (pass == 0) {
          mean = average;
        } else {
          rstd = 1.0f / sqrtf(average + p.eps);
        }
      }
    }
    store_statistics(p, row, mean, rstd);
  }
}

template <class T, std::size_t I>
void launch_forward(const Forward& p, const ForwardPlan& plan, cudaStream_t stream) {
  constexpr Config kConfig = kForwardConfigs[I];
  const dim3 block(static_cast<unsigned>(plan.threads), static_cast<unsigned>(plan.rows));
  const unsigned grid = static_cast<unsigned>(plan.blocks);
  if constexpr (kConfig.vectors == 0) {
    forward_kernel_any<T, kConfig.threads><<<grid, block, 0, stream>>>(p);
  } else {
    forward_kernel<T, kConfig.vectors, kConfig.threads><<<grid, block, 0, stream>>>(p);
  }
  MAMBA_CUDA_CHECK_LAUNCH();
}

using ForwardLauncher = void (*)(const Forward&, const ForwardPlan&, cudaStream_t);

template <class T, std::size_t... I>
constexpr std::array<ForwardLauncher, sizeof...(I)> forward_launchers(std::index_sequence<I...>) {
  return {{&launch_forward<T, I>...}};
}

template <class T>
void forward(const ForwardParams& params, const ForwardPlan& plan) {
  MAMBA_CHECK(params.x.size[1] <= kMaxFeatures, "layer_norm_forward: at most ", kMaxFeatures,
              " features on CUDA, got ", params.x.size[1]);
  Forward p;
  p.x = rows_of(params.x);
  p.weight = rows_of(params.weight);
  p.bias = rows_of(params.bias);
  p.residual = rows_of(params.residual);
  p.y = rows_of(params.y);
  p.residual_out = rows_of(params.residual_out);
  p.mean = params.mean.as<float>();
  p.rstd = params.rstd.as<float>();
  p.rows = params.x.size[0];
  p.features = static_cast<int>(params.x.size[1]);
  p.eps = static_cast<float>(params.eps);
  p.is_rms_norm = params.is_rms_norm;
  static constexpr std::array<ForwardLauncher, kForwardCount> kTable =
      forward_launchers<T>(std::make_index_sequence<kForwardCount>());
  kTable[static_cast<std::size_t>(plan.config)](p, plan, static_cast<cudaStream_t>(params.stream));
}

}  // namespace mamba_native::layer_norm::cuda
