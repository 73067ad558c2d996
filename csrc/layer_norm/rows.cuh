// What the norm's kernels share beside core/cuda/rows.cuh: the branches of a call.
#pragma once

#include "core/cuda/launch.h"
#include "core/cuda/rows.cuh"
#include "core/error.h"
#include "core/math.h"
#include "layer_norm/dropout.h"
#include "layer_norm/plan.h"

namespace mamba_native::layer_norm::cuda {

using mamba_native::cuda::column_of;
using mamba_native::cuda::kMaxFeatures;
using mamba_native::cuda::load_columns;
using mamba_native::cuda::Rows;
using mamba_native::cuda::rows_of;
using mamba_native::cuda::RowSum;
using mamba_native::cuda::store_columns;
using mamba_native::cuda::to_floats;
using mamba_native::cuda::Vector;

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

}  // namespace mamba_native::layer_norm::cuda
