// LayerNorm and RMSNorm with residual addition on CUDA, backward.
//
//   xhat = (h - mean) rstd,  c1 = mean(xhat w dy),  c2 = mean(w dy)  (RMSNorm: mean = c2 = 0)
//   dh   = (w dy - xhat c1 - c2) rstd + dresidual_out;  dx = dresidual = dh
//   dweight = sum over rows of dy xhat,  dbias = sum over rows of dy
//   With BRANCHES w dy becomes w dy + w1 dy1, dx = dropout(dh) rowscale and dx1 = dropout(dh).
//
// Memory bandwidth decides again; what is new is a sum over rows for every column:
//
//   grid.x   a few blocks for each multiprocessor, which walk over the rows
//   block    (threads of a row, rows side by side); a thread keeps the same columns in all rows, so
//            its share of dweight and dbias stays in registers
//
// The next row's loads are under way while the current one is summed, because few blocks have few
// other warps to hide them behind. At the end each block adds up its rows side by side and writes
// one row of partial sums to the workspace; core/cuda/ordered_sums.h adds those up.
#include <algorithm>
#include <array>
#include <utility>

#include "core/cuda/ordered_sums.h"
#include "layer_norm/rows.cuh"

namespace mamba_native::layer_norm::cuda {

struct Backward {
  Rows dy;             // (M, N)
  Rows dresidual_out;  // (M, N), optional
  Rows h;              // (M, N)
  Rows weight;         // (N)
  Rows dx;             // (M, N)
  Rows dresidual;      // (M, N), optional
  Rows dy1;            // (M, N), with weight1
  Rows weight1;        // (N), optional
  Rows dx1;            // (M, N), optional
  Branches branches;
  const float* mean;  // (M), null for RMS
  const float* rstd;  // (M)
  float* workspace;   // (gridDim.x, sums, N): dweight, dbias, dweight1, dbias1
  int sums;           // 2, or 4 with weight1
  std::int64_t rows;
  int features;
  bool is_rms_norm;
};

// What one thread reads of a row.
template <int VECTORS>
struct Loaded {
  Vector dy[VECTORS];
  Vector dy1[VECTORS];  // only with BRANCHES
  Vector h[VECTORS];
  Vector dresidual_out[VECTORS];
  float mean = 0.0f;
  float rstd = 0.0f;
};

template <int VECTORS, bool BRANCHES>
__device__ __forceinline__ void load_row(const Backward& p, std::int64_t row, Loaded<VECTORS>& to) {
  const int features = row < p.rows ? p.features : 0;
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    to.h[v] = load_columns<true>(p.h, row, column_of(v), features);
  }
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    to.dy[v] = load_columns<true>(p.dy, row, column_of(v), features);
  }
  if (BRANCHES && p.dy1.data != nullptr) {
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      to.dy1[v] = load_columns<true>(p.dy1, row, column_of(v), features);
    }
  }
  if (p.dresidual_out.data != nullptr) {
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      to.dresidual_out[v] = load_columns<true>(p.dresidual_out, row, column_of(v), features);
    }
  }
  if (features > 0) {
    to.rstd = p.rstd[row];
    if (!p.is_rms_norm) {
      to.mean = p.mean[row];
    }
  }
}

// One vector of xhat and dy. Columns from `features` on read as dy = 0 and add nothing to any sum,
// whatever their xhat.
__device__ __forceinline__ void normalise(const Backward& p, const Vector& h, const Vector& dy,
                                          float mean, float rstd, float (&xhat)[kVector],
                                          float (&g)[kVector]) {
  to_floats(h, p.h.dtype, xhat);
  to_floats(dy, p.dy.dtype, g);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    xhat[i] = (xhat[i] - mean) * rstd;
  }
}

// The part of dh that needs no sum over the row: w dy rstd + dresidual_out.
__device__ __forceinline__ void add_direct(const Backward& p, const Vector& dresidual_out,
                                           float rstd, float (&wdy)[kVector]) {
  float more[kVector] = {};
  if (p.dresidual_out.data != nullptr) {
    to_floats(dresidual_out, p.dresidual_out.dtype, more);
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    wdy[i] = fmaf(wdy[i], rstd, more[i]);
  }
}

// dh = direct - (xhat c1 + c2) rstd; stores dx, dx1 and dresidual.
template <bool WHOLE, bool BRANCHES>
__device__ __forceinline__ void store_gradient(const Backward& p, std::int64_t row, int column,
                                               const float (&xhat)[kVector],
                                               const float (&direct)[kVector], float c1, float c2,
                                               float rstd) {
  float dh[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    dh[i] = fmaf(-rstd, fmaf(xhat[i], c1, c2), direct[i]);
  }
  if (p.dresidual.data != nullptr) {
    store_columns<WHOLE>(p.dresidual, row, column, p.features, dh);
  }
  if constexpr (BRANCHES) {
    if (p.dx1.data != nullptr) {
      float dx1[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        dx1[i] = dh[i];
      }
      drop(p.branches, 1, row, column, dx1);
      store_columns<WHOLE>(p.dx1, row, column, p.features, dx1);
    }
    drop(p.branches, 0, row, column, dh);
    const float rowscale = rowscale_of(p.branches, row);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      dh[i] *= rowscale;
    }
  }
  store_columns<WHOLE>(p.dx, row, column, p.features, dh);
}

// What one vector of dy adds to the sums of its columns, and returns in `g`, dy on entry: w dy.
__device__ __forceinline__ void take(const float (&weight)[kVector], const float (&xhat)[kVector],
                                     float (&g)[kVector], float (&dweight)[kVector],
                                     float (&dbias)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    dweight[i] = fmaf(g[i], xhat[i], dweight[i]);
    dbias[i] += g[i];
    g[i] *= weight[i];
  }
}

// Everything moves as vectors. Shared memory: kVector * VECTORS * sums floats for each thread of
// one row, when rows lie side by side.
template <int VECTORS, int THREADS, bool BRANCHES>
__global__ void __launch_bounds__(THREADS) backward_kernel(const Backward p) {
  __shared__ float slots[RowSum<2>::kSlots];
  extern __shared__ float shared_sums[];
  RowSum<2> row_sum(slots);

  // dweight, dbias, dweight1, dbias1 of this thread's columns.
  constexpr int kSums = BRANCHES ? 4 : 2;
  float column_sums[kSums][VECTORS][kVector] = {};
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.y;
  std::int64_t first = std::int64_t{blockIdx.x} * blockDim.y;
  Loaded<VECTORS> loaded;
  load_row<VECTORS, BRANCHES>(p, first + threadIdx.y, loaded);
  for (; first < p.rows; first += step) {
    const std::int64_t row = first + threadIdx.y;  // may lie beyond the end; then dy = 0

    // 1. What this thread's columns add to the row's two sums and to the columns' sums. The weight
    // stays in the L1 cache.
    const float rstd = loaded.rstd;
    float xhat[VECTORS][kVector];
    float direct[VECTORS][kVector];
    float sums[2] = {0.0f, 0.0f};
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      float weight[kVector];
      to_floats(load_columns<true>(p.weight, 0, column_of(v), p.features), p.weight.dtype, weight);
      normalise(p, loaded.h[v], loaded.dy[v], loaded.mean, rstd, xhat[v], direct[v]);
      take(weight, xhat[v], direct[v], column_sums[0][v], column_sums[1][v]);
      if constexpr (BRANCHES) {
        if (p.dy1.data != nullptr) {
          float g[kVector];
          to_floats(load_columns<true>(p.weight1, 0, column_of(v), p.features), p.weight1.dtype,
                    weight);
          to_floats(loaded.dy1[v], p.dy1.dtype, g);
          take(weight, xhat[v], g, column_sums[2][v], column_sums[3][v]);
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            direct[v][i] += g[i];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        sums[0] = fmaf(xhat[v][i], direct[v][i], sums[0]);
        sums[1] += direct[v][i];
      }
      add_direct(p, loaded.dresidual_out[v], rstd, direct[v]);
    }

    // 2. The next row's loads, then this row's sums.
    load_row<VECTORS, BRANCHES>(p, row + step, loaded);
    row_sum(sums);
    const float c1 = sums[0] / static_cast<float>(p.features);
    const float c2 = p.is_rms_norm ? 0.0f : sums[1] / static_cast<float>(p.features);

    // 3. Its gradient.
    if (row < p.rows) {
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        store_gradient<true, BRANCHES>(p, row, column_of(v), xhat[v], direct[v], c1, c2, rstd);
      }
    }
  }

  // 4. Rows side by side add up one after the other; the last writes the block's row of partial
  // sums.
  const int sums = BRANCHES ? p.sums : 2;
  for (unsigned turn = 0; turn < blockDim.y; ++turn) {
    if (threadIdx.y == turn) {
#pragma unroll
      for (int sum = 0; sum < kSums; ++sum) {
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
            } else if (column_of(v) < p.features && sum < sums) {
              p.workspace[(std::int64_t{blockIdx.x} * sums + sum) * p.features + column_of(v) + i] =
                  value;
            }
          }
        }
      }
    }
    __syncthreads();
  }
}

// Rows of any width, strides and alignment, first half: a block walks each row twice and writes dh.
template <int THREADS, bool BRANCHES>
__global__ void __launch_bounds__(THREADS) backward_kernel_any(const Backward p) {
  __shared__ float slots[RowSum<2>::kSlots];
  RowSum<2> row_sum(slots);
  const int step = static_cast<int>(blockDim.x) * kVector;
  for (std::int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const float mean = p.is_rms_norm ? 0.0f : p.mean[row];
    const float rstd = p.rstd[row];
    float c1 = 0.0f;
    float c2 = 0.0f;
    for (int pass = 0; pass < 2; ++pass) {
      float sums[2] = {0.0f, 0.0f};
      for (int column = static_cast<int>(threadIdx.x) * kVector; column < p.features;
           column += step) {
        const Vector h = load_columns<false>(p.h, row, column, p.features);
        const Vector dy = load_columns<false>(p.dy, row, column, p.features);
        const Vector weight = load_columns<false>(p.weight, 0, column, p.features);
        Vector dresidual_out;
        if (pass == 1 && p.dresidual_out.data != nullptr) {
          dresidual_out = load_columns<false>(p.dresidual_out, row, column, p.features);
        }
        float xhat[kVector];
        float wdy[kVector];
        float w[kVector];
        normalise(p, h, dy, mean, rstd, xhat, wdy);
        to_floats(weight, p.weight.dtype, w);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          wdy[i] *= w[i];
        }
        if (BRANCHES && p.dy1.data != nullptr) {
          float g[kVector];
          to_floats(load_columns<false>(p.dy1, row, column, p.features), p.dy1.dtype, g);
          to_floats(load_columns<false>(p.weight1, 0, column, p.features), p.weight1.dtype, w);
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            wdy[i] = fmaf(g[i], w[i], wdy[i]);
          }
        }
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          sums[0] = fmaf(xhat[i], wdy[i], sums[0]);
          sums[1] += wdy[i];
        }
        if (pass == 1) {
          add_direct(p, dresidual_out, rstd, wdy);
          store_gradient<false, BRANCHES>(p, row, column, xhat, wdy, c1, c2, rstd);
        }
      }
      if (pass == 0) {
        row_sum(sums);
        c1 = sums[0] / static_cast<float>(p.features);
        c2 = p.is_rms_norm ? 0.0f : sums[1] / static_cast<float>(p.features);
      }
    }
  }
}

// Second half: grid (blocks of columns, rows of the workspace); a thread owns kVector columns of
// every gridDim.y-th row.
template <int THREADS>
__global__ void __launch_bounds__(THREADS) backward_kernel_columns(const Backward p) {
  const int column = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * kVector;
  if (column >= p.features) {
    return;
  }
  float column_sums[4][kVector] = {};
  for (std::int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    const Vector h = load_columns<false>(p.h, row, column, p.features);
    const Vector dy = load_columns<false>(p.dy, row, column, p.features);
    const float one[kVector] = {1.0f, 1.0f, 1.0f, 1.0f};
    float xhat[kVector];
    float g[kVector];
    normalise(p, h, dy, p.is_rms_norm ? 0.0f : p.mean[row], p.rstd[row], xhat, g);
    take(one, xhat, g, column_sums[0], column_sums[1]);
    if (p.dy1.data != nullptr) {
      to_floats(load_columns<false>(p.dy1, row, column, p.features), p.dy1.dtype, g);
      take(one, xhat, g, column_sums[2], column_sums[3]);
    }
  }
#pragma unroll
  for (int sum = 0; sum < 4; ++sum) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (sum < p.sums && column + i < p.features) {
        p.workspace[(std::int64_t{blockIdx.y} * p.sums + sum) * p.features + column + i] =
            column_sums[sum][i];
      }
    }
  }
}

template <std::size_t I>
void launch_backward(const Backward& p, const BackwardPlan& plan, cudaStream_t stream) {
  constexpr Config kConfig = kBackwardConfigs[I];
  const unsigned blocks = static_cast<unsigned>(plan.blocks);
  if constexpr (kConfig.vectors == 0) {
    // No workspace bounds the first half, so it may have as many blocks as rows.
    const unsigned rows = static_cast<unsigned>(std::min<std::int64_t>(p.rows, 0x7fffffff));
    const unsigned threads = static_cast<unsigned>(plan.threads);
    backward_kernel_any<kConfig.threads, kConfig.branches><<<rows, threads, 0, stream>>>(p);
    MAMBA_CUDA_CHECK_LAUNCH();
    const dim3 grid(
        static_cast<unsigned>(ceil_div(p.features, std::int64_t{kVector} * plan.threads)), blocks);
    backward_kernel_columns<kConfig.threads><<<grid, threads, 0, stream>>>(p);
  } else {
    constexpr int kSums = kConfig.branches ? 4 : 2;
    const dim3 block(static_cast<unsigned>(plan.threads), static_cast<unsigned>(plan.rows));
    const std::size_t shared =
        plan.rows > 1 ? sizeof(float) * kSums * kVector * kConfig.vectors * block.x : 0;
    backward_kernel<kConfig.vectors, kConfig.threads, kConfig.branches>
        <<<blocks, block, shared, stream>>>(p);
  }
  MAMBA_CUDA_CHECK_LAUNCH();
}

using BackwardLauncher = void (*)(const Backward&, const BackwardPlan&, cudaStream_t);

template <std::size_t... I>
constexpr std::array<BackwardLauncher, sizeof...(I)> backward_launchers(std::index_sequence<I...>) {
  return {{&launch_backward<I>...}};
}

// dweight, dbias, dweight1 and dbias1: the sums of the first `rows` rows of the workspace.
inline void sum_workspace(const BackwardParams& params, std::int64_t rows) {
  const TensorView* const outputs[] = {&params.dweight, &params.dbias, &params.dweight1,
                                       &params.dbias1};
  const std::int64_t features = params.dweight.size[0];
  mamba_native::cuda::OrderedSums sums;
  for (int i = 0; i < mamba_native::cuda::OrderedSums::kMost; ++i) {
    sums.of[i] = {params.workspace.as<const float>() + i * features, outputs[i]->as<float>(),
                  features};
  }
  mamba_native::cuda::add_in_order(sums, rows, params.workspace.size[1] * features,
                                   static_cast<cudaStream_t>(params.stream));
}

void backward(const BackwardParams& params, const BackwardPlan& plan) {
  MAMBA_CHECK(params.h.size[1] <= kMaxFeatures, "layer_norm_backward: at most ", kMaxFeatures,
              " features on CUDA, got ", params.h.size[1]);
  if (params.h.size[0] > 0) {
    Backward p;
    p.dy = rows_of(params.dy);
    p.dresidual_out = rows_of(params.dresidual_out);
    p.h = rows_of(params.h);
    p.weight = rows_of(params.weight);
    p.dx = rows_of(params.dx);
    p.dresidual = rows_of(params.dresidual);
    p.mean = params.mean.as<const float>();
    p.rstd = params.rstd.as<const float>();
    p.dy1 = rows_of(params.dy1);
    p.weight1 = rows_of(params.weight1);
    p.dx1 = rows_of(params.dx1);
    p.branches = branches_of(params.rowscale, params.dropout);
    p.workspace = params.workspace.as<float>();
    p.sums = static_cast<int>(params.workspace.size[1]);
    p.rows = params.h.size[0];
    p.features = static_cast<int>(params.h.size[1]);
    p.is_rms_norm = params.is_rms_norm;
    static constexpr std::array<BackwardLauncher, kBackwardCount> kTable =
        backward_launchers(std::make_index_sequence<kBackwardCount>());
    kTable[static_cast<std::size_t>(plan.config)](p, plan,
                                                  static_cast<cudaStream_t>(params.stream));
  }
  sum_workspace(params, plan.blocks);
}

}  // namespace mamba_native::layer_norm::cuda
