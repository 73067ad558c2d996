// Whether a tensor may be read and written in vectors. Plain C++, for the choice of kernels.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace mamba_native::cuda {

// True when vectors of `count` elements along the last dimension may move whole: neighbours are
// adjacent, and the base and every other stride keep the alignment of a vector, 16 bytes at most.
inline bool moves_vectors(const TensorView& tensor, std::int64_t count) {
  if (!tensor.present() || tensor.dim == 0) {
    return false;
  }
  const std::int64_t element = size_of(tensor.dtype);
  const std::int64_t alignment = count * element < 16 ? count * element : 16;
  bool aligned = reinterpret_cast<std::uintptr_t>(tensor.data) % alignment == 0 &&
                 (tensor.size[tensor.dim - 1] <= 1 || tensor.stride[tensor.dim - 1] == 1);
  for (int i = 0; i + 1 < tensor.dim; ++i) {
    aligned = aligned && (tensor.size[i] <= 1 || tensor.stride[i] * element % alignment == 0);
  }
  return aligned;
}

}  // namespace mamba_native::cuda
