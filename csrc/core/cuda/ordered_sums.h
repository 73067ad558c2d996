// Sums of partial results in a fixed order, so that every run gives the same bits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace mamba_native::cuda {

// sum[i] = partials[i] + partials[pitch + i] + ...: `count` sums over the rows of a workspace. A
// null `sum` asks for nothing.
struct OrderedSum {
  const float* partials = nullptr;
  float* sum = nullptr;
  std::int64_t count = 0;
};

// What one launch adds up.
struct OrderedSums {
  static constexpr int kMost = 4;
  OrderedSum of[kMost];
};

// `rows` and `pitch`, the distance of the rows in elements, are those of all the sums.
void add_in_order(const OrderedSums& sums, std::int64_t rows, std::int64_t pitch,
                  cudaStream_t stream);

}  // namespace mamba_native::cuda
