// How CUDA picks a kernel. Plain C++, tested without a GPU. Not public; parameters are validated.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/cuda/device.h"
#include "core/cuda/rows.h"
#include "layer_norm/layer_norm.h"

namespace mamba_native::layer_norm::cuda {

using mamba_native::cuda::kVector;

// One row = one kernel for all dtypes: a row of the tensor lies in the registers of `threads`
// threads, `vectors` vectors each. The kernel without vectors walks over the tensor's row several
// times instead; it takes any width, strides and alignment. `branches`: takes what has_branches()
// says, too; its registers would cost the others their occupancy.
struct Config {
  int vectors;
  int threads;  // of a block, at most
  bool branches;
};

inline constexpr Config kForwardConfigs[] = {
    {1, 512, false},  // up to 128 features in one warp
    {2, 512, false},  // up to 256, and widths that four vectors a thread would fill badly
    {4, 512, false},  // up to 8192
    {0, 512, false},  // wider, or not made of vectors
    {4, 512, true},   // up to 8192
    {0, 512, true},   // wider, or not made of vectors
};
inline constexpr std::size_t kForwardCount = sizeof(kForwardConfigs) / sizeof(kForwardConfigs[0]);

// The second kernel's limit of threads leaves it 96 registers, so that two blocks of 320 threads
// (N = 2560) share a multiprocessor.
inline constexpr Config kBackwardConfigs[] = {
    {1, 640, false},  // up to 128 features in one warp
    {2, 640, false},  // up to 5120
    {0, 512, false},  // wider, or not made of vectors
    {2, 512, true},   // up to 4096
    {0, 512, true},   // wider, or not made of vectors
};
inline constexpr std::size_t kBackwardCount =
    sizeof(kBackwardConfigs) / sizeof(kBackwardConfigs[0]);

struct ForwardPlan {
  int config;   // row of kForwardConfigs
  int threads;  // that share a row
  int rows;     // of a block, side by side
  std::int64_t blocks;
};

struct BackwardPlan {
  int config;           // row of kBackwardConfigs
  int threads;          // that share a row
  int rows;             // of a block, side by side
  std::int64_t blocks;  // each writes one row of the workspace
};

ForwardPlan choose_forward(const ForwardParams& params);
BackwardPlan choose_backward(const BackwardParams& params);

std::int64_t workspace_rows(std::int64_t rows, const mamba_native::cuda::DeviceInfo& device);

void forward(const ForwardParams& params, const ForwardPlan& plan);
void backward(const BackwardParams& params, const BackwardPlan& plan);

}  // namespace mamba_native::layer_norm::cuda
