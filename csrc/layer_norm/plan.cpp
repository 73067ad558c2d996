#include "layer_norm/plan.h"

#include <algorithm>

#include "core/cuda/alignment.h"
#include "core/math.h"

namespace mamba_native::layer_norm::cuda {
namespace {

constexpr int kWarp = 32;

// Threads that hold a row of `features` with `vectors` vectors each: whole warps.
std::int64_t threads_for(std::int64_t features, int vectors) {
  return ceil_div(features, std::int64_t{kVector} * vectors * kWarp) * kWarp;
}

bool moves(const TensorView& tensor) {
  return !tensor.present() || mamba_native::cuda::moves_vectors(tensor, kVector);
}

// Threads of a kernel that walks over its row: no more than there are vectors.
int walking_threads(std::int64_t features, const Config& config) {
  return static_cast<int>(std::min<std::int64_t>(config.threads, threads_for(features, 1)));
}

template <std::size_t COUNT>
int index_of(const Config (&configs)[COUNT], int vectors) {
  int index = 0;
  while (configs[index].vectors != vectors) {
    ++index;
  }
  return index;
}

}  // namespace

ForwardPlan choose_forward(const ForwardParams& params) {
  const std::int64_t rows = params.x.size[0];
  const std::int64_t features = params.x.size[1];
  constexpr std::int64_t kMaxBlocks = (std::int64_t{1} << 31) - 1;
  const bool whole = features % kVector == 0 && moves(params.x) && moves(params.weight) &&
                     moves(params.bias) && moves(params.residual) && moves(params.y) &&
                     moves(params.residual_out);
  int vectors = 0;
  for (const int candidate : {1, 2, 4, 8}) {
    const std::int64_t threads = threads_for(features, candidate);
    const Config& config = kForwardConfigs[index_of(kForwardConfigs, candidate)];
    // More vectors a thread mean fewer threads and a cheaper sum, but not when an eighth idles, and
    // beyond four the registers cost more than that.
    const bool fills = threads * kVector * candidate <= features + features / 8;
    if (whole && threads <= config.threads && (vectors == 0 || (fills && candidate <= 4))) {
      vectors = candidate;
    }
  }
  ForwardPlan plan{index_of(kForwardConfigs, vectors), 0, 1, 0};
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
                     moves(params.dresidual);
  int vectors = 0;
  for (const int candidate : {2, 1}) {
    const Config& config = kBackwardConfigs[index_of(kBackwardConfigs, candidate)];
    const std::int64_t threads = threads_for(features, candidate);
    // One vector only where one warp holds the row: a second warp costs more than a second vector.
    if (whole && threads <= config.threads && (candidate > 1 || threads == kWarp)) {
      vectors = candidate;
    }
  }
  BackwardPlan plan{index_of(kBackwardConfigs, vectors), 0, 1, 0};
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
