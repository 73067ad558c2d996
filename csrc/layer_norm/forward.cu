// LayerNorm and RMSNorm with residual addition on CUDA, forward.
//
//   h = x + residual,  y = (h - mean) rstd weight + bias,  rstd = (mean((h - mean)^2) + eps)^-1/2
//   (RMSNorm: mean = 0);  with BRANCHES h = dropout(x rowscale) + dropout(x1) + residual and a
//   second output y1 = (h - mean) rstd weight1 + bias1
//
// Every element is read and written once and hardly computed with, so memory bandwidth decides:
//
//   grid.x   groups of blockDim.y rows (more rows than blocks: striding)
//   block    (threads of a row, rows); thread t of a row owns the vectors t, t + blockDim.x, ...
//            of kVector elements, so that a warp's loads are adjacent, and keeps h in registers
//
// The variance is the mean square of the centred values, computed from registers: no cancellation.
#include <array>
#include <utility>

#include "layer_norm/rows.cuh"

namespace mamba_native::layer_norm::cuda {

struct Forward {
  Rows x;             // (M, N)
  Rows weight;        // (N)
  Rows bias;          // (N), optional
  Rows residual;      // (M, N), optional
  Rows y;             // (M, N)
  Rows residual_out;  // (M, N), optional
  Rows x1;            // (M, N), optional
  Rows weight1;       // (N), optional
  Rows bias1;         // (N), optional
  Rows y1;            // (M, N), with weight1
  Branches branches;
  std::uint8_t* mask;   // (M, N), null: not asked for
  std::uint8_t* mask1;  // (M, N), null: not asked for
  float* mean;          // (M), null for RMS
  float* rstd;          // (M)
  std::int64_t rows;
  int features;
  float eps;
  bool is_rms_norm;
};

// One vector each of what h is the sum of.
struct Terms {
  Vector x;
  Vector x1;
  Vector residual;
};

// `rowscale` is x's factor.
template <bool BRANCHES>
__device__ __forceinline__ void add_terms(const Forward& p, const Terms& terms, float rowscale,
                                          std::int64_t row, int column, float (&h)[kVector]) {
  to_floats(terms.x, p.x.dtype, h);
  float other[kVector];
  if constexpr (BRANCHES) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      h[i] *= rowscale;
    }
    drop(p.branches, 0, row, column, h);
    if (p.x1.data != nullptr) {
      to_floats(terms.x1, p.x1.dtype, other);
      drop(p.branches, 1, row, column, other);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        h[i] += other[i];
      }
    }
  }
  if (p.residual.data != nullptr) {
    to_floats(terms.residual, p.residual.dtype, other);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      h[i] += other[i];
    }
  }
}

__device__ __forceinline__ void store_mask(const Forward& p, std::uint8_t* mask, unsigned branch,
                                           std::int64_t row, int column, int features) {
  if (mask == nullptr) {
    return;
  }
  const unsigned bits = kept_columns(p.branches, branch, row, column);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (column + i < features) {
      mask[row * p.features + column + i] = static_cast<std::uint8_t>(bits >> i & 1u);
    }
  }
}

__device__ __forceinline__ void store_masks(const Forward& p, std::int64_t row, int column,
                                            int features) {
  store_mask(p, p.mask, 0, row, column, features);
  store_mask(p, p.mask1, 1, row, column, features);
}

template <bool WHOLE>
__device__ __forceinline__ void store_output(const Forward& p, const Rows& weights,
                                             const Rows& biases, const Rows& to, std::int64_t row,
                                             int column, float mean, float rstd,
                                             const float (&h)[kVector]) {
  float y[kVector];
  float weight[kVector];
  to_floats(load_columns<WHOLE>(weights, 0, column, p.features), weights.dtype, weight);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    y[i] = (h[i] - mean) * rstd * weight[i];
  }
  if (biases.data != nullptr) {
    float bias[kVector];
    to_floats(load_columns<WHOLE>(biases, 0, column, p.features), biases.dtype, bias);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      y[i] += bias[i];
    }
  }
  store_columns<WHOLE>(to, row, column, p.features, y);
}

template <bool WHOLE, bool BRANCHES>
__device__ __forceinline__ void store_normalised(const Forward& p, std::int64_t row, int column,
                                                 float mean, float rstd,
                                                 const float (&h)[kVector]) {
  store_output<WHOLE>(p, p.weight, p.bias, p.y, row, column, mean, rstd, h);
  if constexpr (BRANCHES) {
    if (p.weight1.data != nullptr) {
      store_output<WHOLE>(p, p.weight1, p.bias1, p.y1, row, column, mean, rstd, h);
    }
  }
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
template <int VECTORS, int THREADS, bool BRANCHES>
__global__ void __launch_bounds__(THREADS) forward_kernel(const Forward p) {
  __shared__ float slots[RowSum<1>::kSlots];
  RowSum<1> row_sum(slots);
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.y;
  for (std::int64_t first = std::int64_t{blockIdx.x} * blockDim.y; first < p.rows; first += step) {
    const std::int64_t row = first + threadIdx.y;
    const bool active = row < p.rows;  // rows beyond the end still meet at the barriers
    const int features = active ? p.features : 0;

    // 1. h, with the loads of up to four vectors of each tensor under way together; two where there
    // are three tensors.
    constexpr int kMost = BRANCHES ? 2 : 4;
    constexpr int kGroup = VECTORS < kMost ? VECTORS : kMost;
    float h[VECTORS][kVector];
    const float rowscale = BRANCHES && active ? rowscale_of(p.branches, row) : 1.0f;
#pragma unroll
    for (int group = 0; group < VECTORS; group += kGroup) {
      Terms terms[kGroup];
#pragma unroll
      for (int v = 0; v < kGroup; ++v) {
        terms[v].x = load_columns<true>(p.x, row, column_of(group + v), features);
      }
      if (p.residual.data != nullptr) {
#pragma unroll
        for (int v = 0; v < kGroup; ++v) {
          terms[v].residual = load_columns<true>(p.residual, row, column_of(group + v), features);
        }
      }
      if (BRANCHES && p.x1.data != nullptr) {
#pragma unroll
        for (int v = 0; v < kGroup; ++v) {
          terms[v].x1 = load_columns<true>(p.x1, row, column_of(group + v), features);
        }
      }
#pragma unroll
      for (int v = 0; v < kGroup; ++v) {
        add_terms<BRANCHES>(p, terms[v], rowscale, row, column_of(group + v), h[group + v]);
        if constexpr (BRANCHES) {
          store_masks(p, row, column_of(group + v), features);
        }
      }
    }
    if (p.residual_out.data != nullptr) {
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        const int column = column_of(v);
        store_columns<true>(p.residual_out, row, column, features, h[v]);
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
        store_normalised<true, BRANCHES>(p, row, column, mean, rstd, h[v]);
      }
      store_statistics(p, row, mean, rstd);
    }
  }
}

// Rows of any width, strides and alignment: the block walks each row three times (twice for
// RMSNorm); after the first, most of it comes from the L2 cache. Two blocks a multiprocessor with
// BRANCHES: left alone (0), ptxas would spill for three.
template <int THREADS, bool BRANCHES>
__global__ void __launch_bounds__(THREADS, BRANCHES ? 2 : 0) forward_kernel_any(const Forward p) {
  __shared__ float slots[RowSum<1>::kSlots];
  RowSum<1> row_sum(slots);
  const int step = static_cast<int>(blockDim.x) * kVector;
  for (std::int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const float rowscale = BRANCHES ? rowscale_of(p.branches, row) : 1.0f;
    float mean = 0.0f;
    float rstd = 0.0f;
    for (int pass = p.is_rms_norm ? 1 : 0; pass < 3; ++pass) {
      float sum[1] = {0.0f};
      for (int column = static_cast<int>(threadIdx.x) * kVector; column < p.features;
           column += step) {
        Terms terms;
        terms.x = load_columns<false>(p.x, row, column, p.features);
        if (p.residual.data != nullptr) {
          terms.residual = load_columns<false>(p.residual, row, column, p.features);
        }
        if (BRANCHES && p.x1.data != nullptr) {
          terms.x1 = load_columns<false>(p.x1, row, column, p.features);
        }
        float h[kVector];
        add_terms<BRANCHES>(p, terms, rowscale, row, column, h);
        if (pass == 2) {
          if constexpr (BRANCHES) {
            store_masks(p, row, column, p.features);
          }
          if (p.residual_out.data != nullptr) {
            store_columns<false>(p.residual_out, row, column, p.features, h);
          }
          store_normalised<false, BRANCHES>(p, row, column, mean, rstd, h);
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

template <std::size_t I>
void launch_forward(const Forward& p, const ForwardPlan& plan, cudaStream_t stream) {
  constexpr Config kConfig = kForwardConfigs[I];
  const dim3 block(static_cast<unsigned>(plan.threads), static_cast<unsigned>(plan.rows));
  const unsigned grid = static_cast<unsigned>(plan.blocks);
  if constexpr (kConfig.vectors == 0) {
    forward_kernel_any<kConfig.threads, kConfig.branches><<<grid, block, 0, stream>>>(p);
  } else {
    forward_kernel<kConfig.vectors, kConfig.threads, kConfig.branches>
        <<<grid, block, 0, stream>>>(p);
  }
  MAMBA_CUDA_CHECK_LAUNCH();
}

using ForwardLauncher = void (*)(const Forward&, const ForwardPlan&, cudaStream_t);

template <std::size_t... I>
constexpr std::array<ForwardLauncher, sizeof...(I)> forward_launchers(std::index_sequence<I...>) {
  return {{&launch_forward<I>...}};
}

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
  p.x1 = rows_of(params.x1);
  p.weight1 = rows_of(params.weight1);
  p.bias1 = rows_of(params.bias1);
  p.y1 = rows_of(params.y1);
  p.branches = branches_of(params.rowscale, params.dropout);
  p.mask = params.mask;
  p.mask1 = params.mask1;
  p.mean = params.mean.as<float>();
  p.rstd = params.rstd.as<float>();
  p.rows = params.x.size[0];
  p.features = static_cast<int>(params.x.size[1]);
  p.eps = static_cast<float>(params.eps);
  p.is_rms_norm = params.is_rms_norm;
  static constexpr std::array<ForwardLauncher, kForwardCount> kTable =
      forward_launchers(std::make_index_sequence<kForwardCount>());
  kTable[static_cast<std::size_t>(plan.config)](p, plan, static_cast<cudaStream_t>(params.stream));
}

}  // namespace mamba_native::layer_norm::cuda
