// How the norms cut a row into vectors and threads. Plain C++, for the choice of kernels.
#pragma once

#include <cstdint>

#include "core/cuda/alignment.h"
#include "core/math.h"

namespace mamba_native::cuda {

// Elements that a thread moves at once: 16 bytes of float32, 8 bytes of a 16-bit type. A residual
// in float32 beside 16-bit activations is the models' default, and only vectors of the same count
// of elements keep both coalesced.
inline constexpr int kVector = 4;

inline constexpr int kWarp = 32;

// Threads that hold a row of `features` with `vectors` vectors each: whole warps.
inline std::int64_t threads_for(std::int64_t features, int vectors) {
  return ceil_div(features, std::int64_t{kVector} * vectors * kWarp) * kWarp;
}

// Whether nothing about the tensor keeps rows from moving as vectors.
inline bool moves(const TensorView& tensor) {
  return !tensor.present() || moves_vectors(tensor, kVector);
}

}  // namespace mamba_native::cuda
