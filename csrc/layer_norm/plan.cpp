#include "layer_norm/plan.h"

#include <algorithm>

#include "core/math.h"
#include "layer_norm/branches.h"

namespace mamba_native::layer_norm::cuda {
namespace {

using mamba_native::cuda::kWarp;
using mamba_native::cuda::moves;
using mamba_native::cuda::threads_for;

// Threads of a kernel that walks over its row: no more than there are vectors.
int walking_threads(std::int64_t features, const Config& config) {
  return static_cast<int>(std::min<std::int64_t>(config.threads, threads_for(features, 1)));
}

// The row of the table with so many vectors, negative when there is none.
template <std::size_t COUNT>
int index_of(const Config (&configs)[COUNT], int vectors, bool branches) {
  for (std::size_t i = 0; i < COUNT; ++i) {
    if (configs[i].vectors == vectors && configs[i].branches == branches) {
      return static_cast<int>(i);
    }
  }
  return -1;
}

}  // namespace

ForwardPlan choose_forward(const ForwardParams& params) {
  const std::int64_t rows = params.x.size[0];
  const std::int64_t features = params.x.size[1];
  constexpr std::int64_t kMaxBlocks = (std::int64_t{1} << 31) - 1;
  const bool whole = features % kVector == 0 && moves(params.x) && moves(params.weight) &&
                     moves(params.bias) && moves(params.residual) && moves(params.y) &&
                     moves(params.residual_out) && moves(params.x1) && moves(params.weight1) &&
                     moves(params.bias1) && moves(params.y1);
  const bool branches = has_branches(params);
  int vectors = 0;
  for (const int candidate : {1, 2, 4}) {
    const std::int64_t threads = threads_for(features, candidate);
    const int index = index_of(kForwardConfigs, candidate, branches);
    // More vectors a thread mean fewer threads and a cheaper sum, but not when an eighth idles.
    const bool fills = threads * kVector * candidate <= features + features / 8;
    if (whole && index >= 0 && threads <= kForwardConfigs[index].threads &&
        (vectors == 0 || fills)) {
      vectors = candidate;
    }
  }
  ForwardPlan plan{index_of(kForwardConfigs, vectors, branches), 0, 1, 0};
  if (vectors == 0) {
    plan.threads = walking_threads(features, kForwardConfigs[plan.config]);
  } else {
    constexpr int kThreads = 128;  // of a block of short rows
    plan.threads = static_cast<int>(threads_for(features, vectors));
    plan.rows = std::max(1, kThreads / plan.threads);
  }
  plan.blocks = std::min(ceil_div(rows, plan.rows), kMaxBlocks);
  return plan;
}

BackwardPlan choose_backward(const BackwardParams& params) {
  const std::int64_t rows = params.h.size[0];
  const std::int64_t features = params.h.size[1];
  const bool whole = features % kVector == 0 && moves(params.dy) && moves(params.dresidual_out) &&
                     moves(params.h) && moves(params.weight) && moves(params.dx) &&
                     moves(params.dresidual) && moves(params.dy1) && moves(params.weight1) &&
                     moves(params.dx1);
  const bool branches = has_branches(params);
  int vectors = 0;
  for (const int candidate : {2, 1}) {
    const int index = index_of(kBackwardConfigs, candidate, branches);
    const std::int64_t threads = threads_for(features, candidate);
    // One vector only where one warp holds the row: a second warp costs more than a second vector.
    if (whole && index >= 0 && threads <= kBackwardConfigs[index].threads &&
        (candidate > 1 || threads == kWarp)) {
      vectors = candidate;
    }
  }
  BackwardPlan plan{index_of(kBackwardConfigs, vectors, branches), 0, 1, 0};
  const Config& config = kBackwardConfigs[plan.config];
  if (vectors == 0) {
    plan.threads = walking_threads(features, config);
  } else {
    plan.threads = static_cast<int>(threads_for(features, vectors));
    plan.rows = std::max(1, config.threads / 2 / plan.threads);
  }
  plan.blocks = std::min(params.workspace.size[0], ceil_div(rows, plan.rows));
  return plan;
}

std::int64_t workspace_rows(std::int64_t rows, const mamba_native::cuda::DeviceInfo& device) {
  constexpr std::int64_t kBlocksPerMultiprocessor = 2;
  return std::min(rows, kBlocksPerMultiprocessor * device.multiprocessors);
}

}  // namespace mamba_native::layer_norm::cuda
