// The gated norm on CUDA, backward.
//
//   xhat = (u - mean) rstd,  dv = dy silu(z) behind the norm, else dy,  g = weight dv
//   c1 = mean(xhat g),  c2 = mean(g) over a group of features  (RMSNorm: mean = c2 = 0)
//   du = (g - xhat c1 - c2) rstd;  dx = du, or before the norm du silu(z)
//   dz = dy v silu'(z) behind the norm with v = xhat weight + bias, before it du x silu'(z)
//   dweight = sum over rows of dv xhat,  dbias = sum over rows of dv
//
// Memory bandwidth decides again; what is new is a sum over rows for every column:
//
//   grid     (a few blocks for each multiprocessor, which walk over the rows; groups)
//   block    (threads of a group of a row, rows side by side); a thread keeps the same columns in
//            all rows, so its share of dweight and dbias stays in registers
//
// The next row's loads are under way while the current one is summed, because few blocks have few
// other warps to hide them behind. At the end each block adds up its rows side by side and writes
// its part of one row of partial sums to the workspace; core/cuda/ordered_sums.h adds those up.
#include <algorithm>
#include <array>
#include <utility>

#include "core/cuda/launch.h"
#include "core/cuda/math.cuh"
#include "core/cuda/ordered_sums.h"
#include "core/cuda/rows.cuh"
#include "core/error.h"
#include "gated_norm/gate.h"
#include "gated_norm/plan.h"

namespace mamba_native::gated_norm::cuda {

using mamba_native::cuda::column_of;
using mamba_native::cuda::fast_sigmoid;
using mamba_native::cuda::kMaxFeatures;
using mamba_native::cuda::load_columns;
using mamba_native::cuda::Rows;
using mamba_native::cuda::rows_of;
using mamba_native::cuda::RowSum;
using mamba_native::cuda::store_columns;
using mamba_native::cuda::to_floats;
using mamba_native::cuda::Vector;

// (G, M), null: absent.
struct Statistics {
  const float* data = nullptr;
  std::int64_t group_stride = 0;
  std::int64_t row_stride = 0;
};

inline Statistics statistics_of(const TensorView& tensor) {
  return tensor.present() ? Statistics{tensor.as<const float>(), tensor.stride[0], tensor.stride[1]}
                          : Statistics();
}

__device__ __forceinline__ float value_of(const Statistics& of, int group, std::int64_t row) {
  return of.data == nullptr ? 0.0f : of.data[group * of.group_stride + row * of.row_stride];
}

struct Backward {
  Rows dy;          // (M, N)
  Rows x;           // (M, N)
  Rows weight;      // (N)
  Rows bias;        // (N), optional
  Rows z;           // (M, N), with a gate
  Rows dx;          // (M, N)
  Rows dz;          // (M, N), with a gate
  Rows y;           // (M, N), optional
  Statistics mean;  // absent for RMS
  Statistics rstd;
  float* workspace;  // (gridDim.x, 2, N): dweight, dbias
  std::int64_t rows;
  int features;
  int width;  // of a group
  int groups;
  bool is_rms_norm;
  Gate gate;
};

// What one thread reads of a row.
template <int VECTORS>
struct Loaded {
  Vector dy[VECTORS];
  Vector x[VECTORS];
  Vector z[VECTORS];  // only with a gate
  float mean = 0.0f;
  float rstd = 0.0f;
};

template <int VECTORS>
__device__ __forceinline__ void load_row(const Backward& p, int group, std::int64_t row,
                                         Loaded<VECTORS>& to) {
  const int begin = group * p.width;
  const int end = row < p.rows ? begin + p.width : begin;
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    to.x[v] = load_columns<true>(p.x, row, begin + column_of(v), end);
  }
  if (p.gate != Gate::none) {
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      to.z[v] = load_columns<true>(p.z, row, begin + column_of(v), end);
    }
  }
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    to.dy[v] = load_columns<true>(p.dy, row, begin + column_of(v), end);
  }
}

template <int VECTORS>
__device__ __forceinline__ void load_statistics(const Backward& p, int group, std::int64_t row,
                                                Loaded<VECTORS>& to) {
  if (row < p.rows) {
    to.mean = value_of(p.mean, group, row);
    to.rstd = value_of(p.rstd, group, row);
  }
}

// What one vector of a row is made of.
struct Parts {
  float xhat[kVector];
  float dy[kVector];
  float gate[kVector];   // silu(z), with a gate
  float slope[kVector];  // silu'(z), with a gate
};

// Columns beyond the group read as dy = 0: they add nothing to any sum, whatever their xhat.
__device__ __forceinline__ void differentiate(const Backward& p, const Vector& x, const Vector& z,
                                              const Vector& dy, float mean, float rstd, Parts& to) {
  to_floats(x, p.x.dtype, to.xhat);
  to_floats(dy, p.dy.dtype, to.dy);
  if (p.gate != Gate::none) {
    to_floats(z, p.z.dtype, to.gate);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float s = fast_sigmoid(to.gate[i]);
      to.slope[i] = s * fmaf(to.gate[i], 1.0f - s, 1.0f);
      to.gate[i] *= s;
    }
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (p.gate == Gate::before) {
      to.slope[i] *= to.xhat[i];
      to.xhat[i] *= to.gate[i];
    }
    to.xhat[i] = (to.xhat[i] - mean) * rstd;
  }
}

__device__ __forceinline__ float dv_of(const Backward& p, const Parts& parts, int i) {
  return p.gate == Gate::after ? parts.dy[i] * parts.gate[i] : parts.dy[i];
}

// What needs no sum: y, and behind the norm dz.
template <bool WHOLE>
__device__ __forceinline__ void finish_output(const Backward& p, std::int64_t row, int column,
                                              int end, const float (&weight)[kVector],
                                              const Parts& parts) {
  if (p.gate != Gate::after && p.y.data == nullptr) {
    return;
  }
  float v[kVector];
  float bias[kVector] = {};
  if (p.bias.data != nullptr) {
    to_floats(load_columns<WHOLE>(p.bias, 0, column, end), p.bias.dtype, bias);
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    v[i] = fmaf(parts.xhat[i], weight[i], bias[i]);
  }
  if (p.gate == Gate::after) {
    float dz[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      dz[i] = parts.dy[i] * v[i] * parts.slope[i];
      v[i] *= parts.gate[i];
    }
    store_columns<WHOLE>(p.dz, row, column, end, dz);
  }
  if (p.y.data != nullptr) {
    store_columns<WHOLE>(p.y, row, column, end, v);
  }
}

// du = (g - xhat c1 - c2) rstd; stores dx, and before the norm dz. `gate` and `slope` are then
// silu(z) and x silu'(z).
template <bool WHOLE>
__device__ __forceinline__ void store_gradient(const Backward& p, std::int64_t row, int column,
                                               int end, const float (&xhat)[kVector],
                                               const float (&g)[kVector],
                                               const float (&gate)[kVector],
                                               const float (&slope)[kVector], float c1, float c2,
                                               float rstd) {
  float dx[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    dx[i] = (g[i] - fmaf(xhat[i], c1, c2)) * rstd;
  }
  if (p.gate == Gate::before) {
    float dz[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      dz[i] = dx[i] * slope[i];
      dx[i] *= gate[i];
    }
    store_columns<WHOLE>(p.dz, row, column, end, dz);
  }
  store_columns<WHOLE>(p.dx, row, column, end, dx);
}

// Everything moves as vectors. Shared memory: 2 * kVector * VECTORS floats for each thread of one
// row, when rows lie side by side.
template <int VECTORS, int THREADS>
__global__ void __launch_bounds__(THREADS) backward_kernel(const Backward p) {
  __shared__ float slots[RowSum<2>::kSlots];
  extern __shared__ float shared_sums[];
  RowSum<2> row_sum(slots);
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.y;
  const int group = static_cast<int>(blockIdx.y);
  const int begin = group * p.width;
  const int end = begin + p.width;
  float column_sums[2][VECTORS][kVector] = {};  // dweight and dbias of this thread's columns
  std::int64_t first = std::int64_t{blockIdx.x} * blockDim.y;
  Loaded<VECTORS> loaded;
  load_row(p, group, first + threadIdx.y, loaded);
  load_statistics(p, group, first + threadIdx.y, loaded);
  for (; first < p.rows; first += step) {
    const std::int64_t row = first + threadIdx.y;  // may lie beyond the end; then dy = 0
    const bool active = row < p.rows;

    // 1. What this thread's columns add to the row's two sums and to the columns' sums. The
    // weight stays in the L1 cache.
    const float rstd = loaded.rstd;
    float xhat[VECTORS][kVector];
    float g[VECTORS][kVector];
    float gate[VECTORS][kVector];
    float slope[VECTORS][kVector];
    float sums[2] = {0.0f, 0.0f};
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      const int column = begin + column_of(v);
      float weight[kVector];
      Parts parts;
      to_floats(load_columns<true>(p.weight, 0, column, end), p.weight.dtype, weight);
      differentiate(p, loaded.x[v], loaded.z[v], loaded.dy[v], loaded.mean, rstd, parts);
      if (active) {
        finish_output<true>(p, row, column, end, weight, parts);
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float dv = dv_of(p, parts, i);
        column_sums[0][v][i] = fmaf(dv, parts.xhat[i], column_sums[0][v][i]);
        column_sums[1][v][i] += dv;
        xhat[v][i] = parts.xhat[i];
        g[v][i] = dv * weight[i];
        gate[v][i] = parts.gate[i];
        slope[v][i] = parts.slope[i];
        sums[0] = fmaf(xhat[v][i], g[v][i], sums[0]);
        sums[1] += g[v][i];
      }
    }

    // 2. The next row's loads, then this row's sums. Its statistics come later: ptxas has
    // no register left for them before.
    load_row(p, group, row + step, loaded);
    row_sum(sums);
    load_statistics(p, group, row + step, loaded);
    const float c1 = sums[0] / static_cast<float>(p.width);
    const float c2 = p.is_rms_norm ? 0.0f : sums[1] / static_cast<float>(p.width);

    // 3. Its gradient.
    if (active) {
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        store_gradient<true>(p, row, begin + column_of(v), end, xhat[v], g[v], gate[v], slope[v],
                             c1, c2, rstd);
      }
    }
  }

  // 4. Rows side by side add up one after the other; the last writes the block's partial sums.
  for (unsigned turn = 0; turn < blockDim.y; ++turn) {
    if (threadIdx.y == turn) {
#pragma unroll
      for (int sum = 0; sum < 2; ++sum) {
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            const int slot =
                static_cast<int>(((sum * VECTORS + v) * kVector + i) * blockDim.x + threadIdx.x);
            float& value = column_sums[sum][v][i];
            if (turn > 0) {
              value += shared_sums[slot];
            }
            if (turn + 1 < blockDim.y) {
              shared_sums[slot] = value;
            } else if (column_of(v) < p.width) {
              p.workspace[(std::int64_t{blockIdx.x} * 2 + sum) * p.features + begin + column_of(v) +
                          i] = value;
            }
          }
        }
      }
    }
    __syncthreads();
  }
}

// Groups of any width, strides and alignment, first half: a block walks each twice and writes
// everything but the sums over rows.
template <int THREADS>
__global__ void __launch_bounds__(THREADS) backward_kernel_any(const Backward p) {
  __shared__ float slots[RowSum<2>::kSlots];
  RowSum<2> row_sum(slots);
  const int step = static_cast<int>(blockDim.x) * kVector;
  for (int group = static_cast<int>(blockIdx.y); group < p.groups;
       group += static_cast<int>(gridDim.y)) {
    const int begin = group * p.width;
    const int end = begin + p.width;
    for (std::int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
      const float mean = value_of(p.mean, group, row);
      const float rstd = value_of(p.rstd, group, row);
      float c1 = 0.0f;
      float c2 = 0.0f;
      for (int pass = 0; pass < 2; ++pass) {
        float sums[2] = {0.0f, 0.0f};
        for (int column = begin + column_of(0); column < end; column += step) {
          const Vector x = load_columns<false>(p.x, row, column, end);
          const Vector dy = load_columns<false>(p.dy, row, column, end);
          Vector z;
          if (p.gate != Gate::none) {
            z = load_columns<false>(p.z, row, column, end);
          }
          float weight[kVector];
          to_floats(load_columns<false>(p.weight, 0, column, end), p.weight.dtype, weight);
          Parts parts;
          differentiate(p, x, z, dy, mean, rstd, parts);
          if (pass == 1) {
            finish_output<false>(p, row, column, end, weight, parts);
          }
          float g[kVector];
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            g[i] = dv_of(p, parts, i) * weight[i];
            sums[0] = fmaf(parts.xhat[i], g[i], sums[0]);
            sums[1] += g[i];
          }
          if (pass == 1) {
            store_gradient<false>(p, row, column, end, parts.xhat, g, parts.gate, parts.slope, c1,
                                  c2, rstd);
          }
        }
        if (pass == 0) {
          row_sum(sums);
          c1 = sums[0] / static_cast<float>(p.width);
          c2 = p.is_rms_norm ? 0.0f : sums[1] / static_cast<float>(p.width);
        }
      }
    }
  }
}

// Second half: grid (blocks of columns, rows of the workspace, groups); a thread owns kVector
// columns of every gridDim.y-th row.
template <int THREADS>
__global__ void __launch_bounds__(THREADS) backward_kernel_columns(const Backward p) {
  const int local = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * kVector;
  if (local >= p.width) {
    return;
  }
  for (int group = static_cast<int>(blockIdx.z); group < p.groups;
       group += static_cast<int>(gridDim.z)) {
    const int column = group * p.width + local;
    const int end = (group + 1) * p.width;
    float column_sums[2][kVector] = {};
    for (std::int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
      const Vector x = load_columns<false>(p.x, row, column, end);
      const Vector dy = load_columns<false>(p.dy, row, column, end);
      Vector z;
      if (p.gate != Gate::none) {
        z = load_columns<false>(p.z, row, column, end);
      }
      Parts parts;
      differentiate(p, x, z, dy, value_of(p.mean, group, row), value_of(p.rstd, group, row), parts);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float dv = dv_of(p, parts, i);
        column_sums[0][i] = fmaf(dv, parts.xhat[i], column_sums[0][i]);
        column_sums[1][i] += dv;
      }
    }
#pragma unroll
    for (int sum = 0; sum < 2; ++sum) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (column + i < end) {
          p.workspace[(std::int64_t{blockIdx.y} * 2 + sum) * p.features + column + i] =
              column_sums[sum][i];
        }
      }
    }
  }
}

template <std::size_t I>
void launch_backward(const Backward& p, const Plan& plan, cudaStream_t stream) {
  constexpr Config kConfig = kBackwardConfigs[I];
  const unsigned blocks = static_cast<unsigned>(plan.blocks);
  const unsigned groups = static_cast<unsigned>(plan.group_blocks);
  const unsigned threads = static_cast<unsigned>(plan.threads);
  if constexpr (kConfig.vectors == 0) {
    // No workspace bounds the first half, so it may have as many blocks as rows.
    const dim3 grid(static_cast<unsigned>(std::min<std::int64_t>(p.rows, 0x7fffffff)), groups);
    backward_kernel_any<kConfig.threads><<<grid, threads, 0, stream>>>(p);
    MAMBA_CUDA_CHECK_LAUNCH();
    const dim3 columns(
        static_cast<unsigned>(ceil_div(p.width, std::int64_t{kVector} * plan.threads)), blocks,
        groups);
    backward_kernel_columns<kConfig.threads><<<columns, threads, 0, stream>>>(p);
  } else {
    const dim3 block(threads, static_cast<unsigned>(plan.rows));
    const std::size_t shared =
        plan.rows > 1 ? sizeof(float) * 2 * kVector * kConfig.vectors * block.x : 0;
    backward_kernel<kConfig.vectors, kConfig.threads>
        <<<dim3(blocks, groups), block, shared, stream>>>(p);
  }
  MAMBA_CUDA_CHECK_LAUNCH();
}

using BackwardLauncher = void (*)(const Backward&, const Plan&, cudaStream_t);

template <std::size_t... I>
constexpr std::array<BackwardLauncher, sizeof...(I)> backward_launchers(std::index_sequence<I...>) {
  return {{&launch_backward<I>...}};
}

// dweight and dbias: the sums of the first `rows` rows of the workspace.
inline void sum_workspace(const BackwardParams& params, std::int64_t rows) {
  const std::int64_t features = params.dweight.size[0];
  const float* const partials = params.workspace.as<const float>();
  mamba_native::cuda::OrderedSums sums;
  sums.of[0] = {partials, params.dweight.as<float>(), features};
  sums.of[1] = {partials + features, params.dbias.as<float>(), features};
  mamba_native::cuda::add_in_order(sums, rows, 2 * features,
                                   static_cast<cudaStream_t>(params.stream));
}

void backward(const BackwardParams& params, const Plan& plan) {
  MAMBA_CHECK(params.x.size[1] <= kMaxFeatures, "gated_norm_backward: at most ", kMaxFeatures,
              " features on CUDA, got ", params.x.size[1]);
  if (params.x.size[0] > 0) {
    Backward p;
    p.dy = rows_of(params.dy, params.group_size);
    p.x = rows_of(params.x, params.group_size);
    p.weight = rows_of(params.weight, params.group_size);
    p.bias = rows_of(params.bias, params.group_size);
    p.z = rows_of(params.z, params.group_size);
    p.dx = rows_of(params.dx, params.group_size);
    p.dz = rows_of(params.dz, params.group_size);
    p.y = rows_of(params.y, params.group_size);
    p.mean = statistics_of(params.mean);
    p.rstd = statistics_of(params.rstd);
    p.workspace = params.workspace.as<float>();
    p.rows = params.x.size[0];
    p.features = static_cast<int>(params.x.size[1]);
    p.width = static_cast<int>(params.group_size);
    p.groups = p.features / p.width;
    p.is_rms_norm = params.is_rms_norm;
    p.gate = gate_of(params);
    static constexpr std::array<BackwardLauncher, kBackwardCount> kTable =
        backward_launchers(std::make_index_sequence<kBackwardCount>());
    kTable[static_cast<std::size_t>(plan.config)](p, plan,
                                                  static_cast<cudaStream_t>(params.stream));
  }
  sum_workspace(params, plan.blocks);
}

}  // namespace mamba_native::gated_norm::cuda
