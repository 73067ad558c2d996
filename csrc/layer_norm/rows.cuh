// How the norm's kernels see their tensors: rows of vectors of kVector elements, of a dtype known
// at run time, and the sum over the threads that share a row.
//
// A block is (threads that share a row, rows side by side); blockDim.x is a multiple of 32, so a
// warp never holds parts of two rows.
#pragma once

#include "core/cuda/alignment.h"
#include "core/cuda/any_dtype.cuh"
#include "core/cuda/launch.h"
#include "core/cuda/memory.cuh"
#include "core/error.h"
#include "core/math.h"
#include "layer_norm/dropout.h"
#include "layer_norm/plan.h"

namespace mamba_native::layer_norm::cuda {

using mamba_native::cuda::Stored;
using mamba_native::cuda::to_floats;
using mamba_native::cuda::warp_sum;
using Vector = Stored<kVector>;

// Columns are int; a step beyond the last one must not overflow.
inline constexpr std::int64_t kMaxFeatures = std::int64_t{1} << 30;

// A (M, N) tensor, or (N) as one row.
struct Rows {
  void* data = nullptr;  // null: absent
  DType dtype = DType::f32;
  bool vectorize = false;
  std::int64_t row_stride = 0;
  std::int64_t step = 1;  // between features
};

inline Rows rows_of(const TensorView& tensor) {
  Rows rows;
  if (tensor.present()) {
    rows.data = tensor.data;
    rows.dtype = tensor.dtype;
    rows.vectorize = mamba_native::cuda::moves_vectors(tensor, kVector);
    rows.row_stride = tensor.dim == 2 ? tensor.stride[0] : 0;
    rows.step = tensor.stride[tensor.dim - 1];
  }
  return rows;
}

// The first column of this thread's vector v.
__device__ __forceinline__ int column_of(int v) {
  return static_cast<int>(v * blockDim.x + threadIdx.x) * kVector;
}

// The kVector elements of `row` from `column` on; those from `features` on read as 0. WHOLE: every
// tensor moves as vectors and features is a multiple of kVector.
template <bool WHOLE>
__device__ __forceinline__ Vector load_vector(const Rows& rows, std::int64_t row, int column,
                                              int features) {
  const bool inside = column < features;
  if constexpr (WHOLE) {
    return mamba_native::cuda::load_stored<kVector>(
        rows.data, rows.dtype, row * rows.row_stride + column, 1, inside ? kVector : 0, inside);
  } else {
    return mamba_native::cuda::load_stored<kVector>(rows.data, rows.dtype,
                                                    row * rows.row_stride + column * rows.step,
                                                    rows.step, features - column, rows.vectorize);
  }
}

template <bool WHOLE>
__device__ __forceinline__ void store_vector(const Rows& rows, std::int64_t row, int column,
                                             int features, const float (&values)[kVector]) {
  const Vector stored = mamba_native::cuda::to_stored<kVector>(values, rows.dtype);
  const bool inside = column < features;
  if constexpr (WHOLE) {
    mamba_native::cuda::store_stored<kVector>(rows.data, rows.dtype, row * rows.row_stride + column,
                                              1, inside ? kVector : 0, inside, stored);
  } else {
    mamba_native::cuda::store_stored<kVector>(rows.data, rows.dtype,
                                              row * rows.row_stride + column * rows.step, rows.step,
                                              features - column, rows.vectorize, stored);
  }
}

// What changes the branches before they are added: x's rowscale, and dropout.
struct Branches {
  const void* rowscale = nullptr;  // (M), null: absent
  DType dtype = DType::f32;        // of rowscale
  std::int64_t stride = 0;         // of rowscale
  Dropout dropout;
  const std::uint64_t* seed = nullptr;  // read only with dropout
};

inline Branches branches_of(const TensorView& rowscale, const DropoutParams& dropout) {
  Branches branches;
  if (rowscale.present()) {
    branches.rowscale = rowscale.data;
    branches.dtype = rowscale.dtype;
    branches.stride = rowscale.stride[0];
  }
  branches.dropout = dropout_of(dropout.p);
  branches.seed = dropout.seed.as<const std::uint64_t>();
  return branches;
}

__device__ __forceinline__ float rowscale_of(const Branches& branches, std::int64_t row) {
  return branches.rowscale == nullptr
             ? 1.0f
             : mamba_native::cuda::load_weight(branches.rowscale, branches.dtype,
                                               row * branches.stride);
}

// Bit i: column + i stays. The vectors of dropout and of memory are the same.
__device__ __forceinline__ unsigned kept_columns(const Branches& branches, unsigned branch,
                                                 std::int64_t row, int column) {
  static_assert(kVector == kDropoutGroup, "one counter for each vector");
  return kept(branches.dropout, *branches.seed, branch, row, column / kVector);
}

__device__ __forceinline__ void drop(const Branches& branches, unsigned branch, std::int64_t row,
                                     int column, float (&values)[kVector]) {
  if (branches.dropout.threshold == 0) {
    return;
  }
  const unsigned bits = kept_columns(branches, branch, row, column);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    values[i] = (bits >> i & 1u) != 0 ? values[i] * branches.dropout.scale : 0.0f;
  }
}

// Sums over the threads of a row, `COUNT` values at a time, in an order that never changes. Each
// sum takes the other half of the slots: a warp that is already writing the next sum cannot
// overwrite what a slower one still reads, and the barrier of the next sum comes before the halves
// meet again.
template <int COUNT>
class RowSum {
 public:
  static constexpr int kSlots = 2 * 32 * COUNT;

  __device__ explicit RowSum(float* slots) : slots_(slots) {}

  __device__ __forceinline__ void operator()(float (&values)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      values[i] = warp_sum(values[i]);
    }
    const int warps = static_cast<int>(blockDim.x / 32);
    if (warps == 1) {
      return;
    }
    const int warp = static_cast<int>(threadIdx.x / 32);
    const int lane = static_cast<int>(threadIdx.x % 32);
    float* const mine =
        slots_ + half_ * (32 * COUNT) + static_cast<int>(threadIdx.y) * warps * COUNT;
    half_ ^= 1;
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        mine[warp * COUNT + i] = values[i];
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      values[i] = warp_sum(lane < warps ? mine[lane * COUNT + i] : 0.0f);
    }
  }

 private:
  float* slots_;
  int half_ = 0;
};

}  // namespace mamba_native::layer_norm::cuda
