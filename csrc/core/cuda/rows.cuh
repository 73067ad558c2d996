// How the norms' kernels see their tensors: rows of vectors of kVector elements, of a dtype known
// at run time, and the sum over the threads that share a row.
//
// A block is (threads that share a row, rows side by side); blockDim.x is a multiple of 32, so a
// warp never holds parts of two rows.
#pragma once

#include "core/cuda/any_dtype.cuh"
#include "core/cuda/memory.cuh"
#include "core/cuda/rows.h"

namespace mamba_native::cuda {

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

// `part`: kernels read from its multiples on, not only from the row's first column.
inline Rows rows_of(const TensorView& tensor, std::int64_t part = kVector) {
  Rows rows;
  if (tensor.present()) {
    rows.data = tensor.data;
    rows.dtype = tensor.dtype;
    rows.vectorize = part % kVector == 0 && moves_vectors(tensor, kVector);
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
__device__ __forceinline__ Vector load_columns(const Rows& rows, std::int64_t row, int column,
                                               int features) {
  const bool inside = column < features;
  if constexpr (WHOLE) {
    return load_stored<kVector>(rows.data, rows.dtype, row * rows.row_stride + column, 1,
                                inside ? kVector : 0, inside);
  } else {
    return load_stored<kVector>(rows.data, rows.dtype, row * rows.row_stride + column * rows.step,
                                rows.step, features - column, rows.vectorize);
  }
}

template <bool WHOLE>
__device__ __forceinline__ void store_columns(const Rows& rows, std::int64_t row, int column,
                                              int features, const float (&values)[kVector]) {
  const Vector stored = to_stored<kVector>(values, rows.dtype);
  const bool inside = column < features;
  if constexpr (WHOLE) {
    store_stored<kVector>(rows.data, rows.dtype, row * rows.row_stride + column, 1,
                          inside ? kVector : 0, inside, stored);
  } else {
    store_stored<kVector>(rows.data, rows.dtype, row * rows.row_stride + column * rows.step,
                          rows.step, features - column, rows.vectorize, stored);
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

}  // namespace mamba_native::cuda
