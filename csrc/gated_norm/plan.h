// How CUDA picks a kernel. Plain C++, tested without a GPU. Not public; parameters are validated.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/cuda/device.h"
#include "core/cuda/rows.h"
#include "gated_norm/gated_norm.h"

namespace mamba_native::gated_norm::cuda {

using mamba_native::cuda::kVector;

// One row = one kernel for all dtypes: a group of a row of the tensor lies in the registers of
// `threads` threads, `vectors` vectors each. The kernel without vectors walks over the group
// several times instead; it takes any width, strides and alignment.
struct Config {
  int vectors;
  int threads;  // of a block, at most
};

inline constexpr Config kForwardConfigs[] = {
    {1, 512},  // up to 128 features in one warp, and widths that four would fill badly
    {4, 512},  // up to 8192
    {0, 512},  // wider, or not made of vectors
};
inline constexpr std::size_t kForwardCount = sizeof(kForwardConfigs) / sizeof(kForwardConfigs[0]);

inline constexpr Config kBackwardConfigs[] = {
    {2, 640},  // up to 5120
    {0, 512},  // wider, or not made of vectors
};
inline constexpr std::size_t kBackwardCount =
    sizeof(kBackwardConfigs) / sizeof(kBackwardConfigs[0]);

// What the second dimension of a grid may be. Groups in registers have a row of the grid each; the
// kernels that walk stride over more groups than this.
inline constexpr std::int64_t kMostGroupBlocks = 65535;

struct Plan {
  int config;           // row of the table
  int threads;          // that share a group of a row
  int rows;             // of a block, side by side
  std::int64_t blocks;  // backward: each writes one row of the workspace
  std::int64_t group_blocks;
};

Plan choose_forward(const ForwardParams& params);
Plan choose_backward(const BackwardParams& params);

std::int64_t workspace_rows(std::int64_t rows, std::int64_t groups,
                            const mamba_native::cuda::DeviceInfo& device);

void forward(const ForwardParams& params, const Plan& plan);
void backward(const BackwardParams& params, const Plan& plan);

}  // namespace mamba_native::gated_norm::cuda
