// The gated norm on CUDA, forward.
//
//   u = x silu(z) or x,  v = (u - mean) rstd weight + bias,  y = v or v silu(z)
//   rstd = (mean((u - mean)^2) + eps)^-1/2, over a group of features; RMSNorm: mean = 0
//
// Every element is read and written once and hardly computed with, so memory bandwidth decides:
//
//   grid     (batches of blockDim.y rows, striding where there are more; groups)
//   block    (threads of a group of a row, rows); thread t owns the vectors t, t + blockDim.x, ...
//            of kVector elements, so that a warp's loads are adjacent, and keeps u in registers
//
// The variance is the mean square of the centred values, computed from registers: no cancellation.
#include <array>
#include <utility>

#include "core/cuda/launch.h"
#include "core/cuda/math.cuh"
#include "core/cuda/rows.cuh"
#include "core/error.h"
#include "gated_norm/gate.h"
#include "gated_norm/plan.h"

namespace mamba_native::gated_norm::cuda {

using mamba_native::cuda::column_of;
using mamba_native::cuda::fast_silu;
using mamba_native::cuda::kMaxFeatures;
using mamba_native::cuda::load_columns;
using mamba_native::cuda::Rows;
using mamba_native::cuda::rows_of;
using mamba_native::cuda::RowSum;
using mamba_native::cuda::store_columns;
using mamba_native::cuda::to_floats;
using mamba_native::cuda::Vector;

struct Forward {
  Rows x;       // (M, N)
  Rows weight;  // (N)
  Rows bias;    // (N), optional
  Rows z;       // (M, N), with a gate
  Rows y;       // (M, N)
  float* mean;  // (G, M), null for RMS
  float* rstd;  // (G, M)
  std::int64_t rows;
  int width;  // of a group
  int groups;
  float eps;
  bool is_rms_norm;
  Gate gate;
};

__device__ __forceinline__ void multiply_by_gate(const Forward& p, const Vector& z,
                                                 float (&values)[kVector]) {
  float gate[kVector];
  to_floats(z, p.z.dtype, gate);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    values[i] *= fast_silu(gate[i]);
  }
}

// `z` is read only behind the norm.
template <bool WHOLE>
__device__ __forceinline__ void store_output(const Forward& p, std::int64_t row, int column,
                                             int end, float mean, float rstd,
                                             const float (&u)[kVector], const Vector& z) {
  float y[kVector];
  float weight[kVector];
  to_floats(load_columns<WHOLE>(p.weight, 0, column, end), p.weight.dtype, weight);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    y[i] = (u[i] - mean) * rstd * weight[i];
  }
  if (p.bias.data != nullptr) {
    float bias[kVector];
    to_floats(load_columns<WHOLE>(p.bias, 0, column, end), p.bias.dtype, bias);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      y[i] += bias[i];
    }
  }
  if (p.gate == Gate::after) {
    multiply_by_gate(p, z, y);
  }
  store_columns<WHOLE>(p.y, row, column, end, y);
}

__device__ __forceinline__ void store_statistics(const Forward& p, int group, std::int64_t row,
                                                 float mean, float rstd) {
  if (threadIdx.x == 0) {
    p.rstd[group * p.rows + row] = rstd;
    if (!p.is_rms_norm) {
      p.mean[group * p.rows + row] = mean;
    }
  }
}

// Everything moves as vectors.
template <int VECTORS, int THREADS>
__global__ void __launch_bounds__(THREADS) forward_kernel(const Forward p) {
  __shared__ float slots[RowSum<1>::kSlots];
  RowSum<1> row_sum(slots);
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.y;
  const int group = static_cast<int>(blockIdx.y);
  const int begin = group * p.width;
  for (std::int64_t first = std::int64_t{blockIdx.x} * blockDim.y; first < p.rows; first += step) {
    const std::int64_t row = first + threadIdx.y;
    const bool active = row < p.rows;  // rows beyond the end still meet at the barriers
    const int end = active ? begin + p.width : begin;

    // 1. u, with all loads under way together.
    Vector x[VECTORS];
    Vector z[VECTORS];
    float u[VECTORS][kVector];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      x[v] = load_columns<true>(p.x, row, begin + column_of(v), end);
    }
    if (p.gate != Gate::none) {
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        z[v] = load_columns<true>(p.z, row, begin + column_of(v), end);
      }
    }
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      to_floats(x[v], p.x.dtype, u[v]);
      if (p.gate == Gate::before) {
        multiply_by_gate(p, z[v], u[v]);
      }
    }

    // 2. Mean, then variance. Columns beyond the group hold zeros.
    float mean = 0.0f;
    if (!p.is_rms_norm) {
      float sum[1] = {0.0f};
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        sum[0] += (u[v][0] + u[v][1]) + (u[v][2] + u[v][3]);
      }
      row_sum(sum);
      mean = sum[0] / static_cast<float>(p.width);
    }
    float squares[1] = {0.0f};
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      const bool inside = begin + column_of(v) < end;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float centred = inside ? u[v][i] - mean : 0.0f;
        squares[0] = fmaf(centred, centred, squares[0]);
      }
    }
    row_sum(squares);
    const float rstd = 1.0f / sqrtf(squares[0] / static_cast<float>(p.width) + p.eps);

    // 3. Output.
    if (active) {
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        store_output<true>(p, row, begin + column_of(v), end, mean, rstd, u[v], z[v]);
      }
      store_statistics(p, group, row, mean, rstd);
    }
  }
}

// Groups of any width, strides and alignment: the block walks each three times (twice for RMSNorm);
// after the first, most of it comes from the L2 cache.
template <int THREADS>
__global__ void __launch_bounds__(THREADS) forward_kernel_any(const Forward p) {
  __shared__ float slots[RowSum<1>::kSlots];
  RowSum<1> row_sum(slots);
  const int step = static_cast<int>(blockDim.x) * kVector;
  for (int group = static_cast<int>(blockIdx.y); group < p.groups;
       group += static_cast<int>(gridDim.y)) {
    const int begin = group * p.width;
    const int end = begin + p.width;
    for (std::int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
      float mean = 0.0f;
      float rstd = 0.0f;
      for (int pass = p.is_rms_norm ? 1 : 0; pass < 3; ++pass) {
        float sum[1] = {0.0f};
        for (int column = begin + column_of(0); column < end; column += step) {
          const Vector x = load_columns<false>(p.x, row, column, end);
          Vector z;
          if (p.gate != Gate::none) {
            z = load_columns<false>(p.z, row, column, end);
          }
          float u[kVector];
          to_floats(x, p.x.dtype, u);
          if (p.gate == Gate::before) {
            multiply_by_gate(p, z, u);
          }
          if (pass == 2) {
            store_output<false>(p, row, column, end, mean, rstd, u, z);
            continue;
          }
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            const float centred = column + i < end ? u[i] - mean : 0.0f;
            sum[0] += pass == 0 ? centred : centred * centred;
          }
        }
        if (pass < 2) {
          row_sum(sum);
          const float average = sum[0] / static_cast<float>(p.width);
          if (pass == 0) {
            mean = average;
          } else {
            rstd = 1.0f / sqrtf(average + p.eps);
          }
        }
      }
      store_statistics(p, group, row, mean, rstd);
    }
  }
}

template <std::size_t I>
void launch_forward(const Forward& p, const Plan& plan, cudaStream_t stream) {
  constexpr Config kConfig = kForwardConfigs[I];
  const dim3 block(static_cast<unsigned>(plan.threads), static_cast<unsigned>(plan.rows));
  const dim3 grid(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.group_blocks));
  if constexpr (kConfig.vectors == 0) {
    forward_kernel_any<kConfig.threads><<<grid, block, 0, stream>>>(p);
  } else {
    forward_kernel<kConfig.vectors, kConfig.threads><<<grid, block, 0, stream>>>(p);
  }
  MAMBA_CUDA_CHECK_LAUNCH();
}

using ForwardLauncher = void (*)(const Forward&, const Plan&, cudaStream_t);

template <std::size_t... I>
constexpr std::array<ForwardLauncher, sizeof...(I)> forward_launchers(std::index_sequence<I...>) {
  return {{&launch_forward<I>...}};
}

void forward(const ForwardParams& params, const Plan& plan) {
  MAMBA_CHECK(params.x.size[1] <= kMaxFeatures, "gated_norm_forward: at most ", kMaxFeatures,
              " features on CUDA, got ", params.x.size[1]);
  Forward p;
  p.x = rows_of(params.x, params.group_size);
  p.weight = rows_of(params.weight, params.group_size);
  p.bias = rows_of(params.bias, params.group_size);
  p.z = rows_of(params.z, params.group_size);
  p.y = rows_of(params.y, params.group_size);
  p.mean = params.mean.as<float>();
  p.rstd = params.rstd.as<float>();
  p.rows = params.x.size[0];
  p.width = static_cast<int>(params.group_size);
  p.groups = static_cast<int>(params.x.size[1] / params.group_size);
  p.eps = static_cast<float>(params.eps);
  p.is_rms_norm = params.is_rms_norm;
  p.gate = gate_of(params);
  static constexpr std::array<ForwardLauncher, kForwardCount> kTable =
      forward_launchers(std::make_index_sequence<kForwardCount>());
  kTable[static_cast<std::size_t>(plan.config)](p, plan, static_cast<cudaStream_t>(params.stream));
}

}  // namespace mamba_native::gated_norm::cuda
