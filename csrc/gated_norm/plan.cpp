#include "gated_norm/plan.h"

#include <algorithm>

namespace mamba_native::gated_norm::cuda {
namespace {

using mamba_native::cuda::moves;
using mamba_native::cuda::threads_for;

// The row of the table with so many vectors.
template <std::size_t COUNT>
int index_of(const Config (&configs)[COUNT], int vectors) {
  int index = 0;
  while (configs[index].vectors != vectors) {
    ++index;
  }
  return index;
}

// `block_threads`: of a block of narrow groups.
Plan plan_of(int index, const Config& config, std::int64_t group_size, std::int64_t groups,
             int block_threads) {
  Plan plan{index, 0, 1, 0, std::min(groups, kMostGroupBlocks)};
  if (config.vectors == 0) {  // no more threads than there are vectors
    plan.threads =
        static_cast<int>(std::min<std::int64_t>(config.threads, threads_for(group_size, 1)));
  } else {
    plan.threads = static_cast<int>(threads_for(group_size, config.vectors));
    plan.rows = std::max(1, block_threads / plan.threads);
  }
  return plan;
}

}  // namespace

Plan choose_forward(const ForwardParams& params) {
  const std::int64_t width = params.group_size;
  const std::int64_t groups = params.x.size[1] / width;
  const bool whole = width % kVector == 0 && groups <= kMostGroupBlocks && moves(params.x) &&
                     moves(params.weight) && moves(params.bias) && moves(params.z) &&
                     moves(params.y);
  int vectors = 0;
  for (const Config& config : kForwardConfigs) {
    if (!whole || config.vectors == 0) {
      continue;
    }
    const std::int64_t threads = threads_for(width, config.vectors);
    // More vectors a thread mean fewer threads and a cheaper sum, but not when an eighth idles.
    const bool fills = threads * kVector * config.vectors <= width + width / 8;
    if (threads <= config.threads && (vectors == 0 || fills)) {
      vectors = config.vectors;
    }
  }
  const int index = index_of(kForwardConfigs, vectors);
  Plan plan = plan_of(index, kForwardConfigs[index], width, groups, 128);
  constexpr std::int64_t kMostBlocks = (std::int64_t{1} << 31) - 1;
  plan.blocks = std::min(ceil_div(params.x.size[0], plan.rows), kMostBlocks);
  return plan;
}

Plan choose_backward(const BackwardParams& params) {
  const std::int64_t width = params.group_size;
  const std::int64_t groups = params.x.size[1] / width;
  const bool whole = width % kVector == 0 && groups <= kMostGroupBlocks && moves(params.dy) &&
                     moves(params.x) && moves(params.weight) && moves(params.bias) &&
                     moves(params.z) && moves(params.dx) && moves(params.dz) && moves(params.y);
  const Config& config = kBackwardConfigs[0];
  const int index = whole && threads_for(width, config.vectors) <= config.threads
                        ? 0
                        : index_of(kBackwardConfigs, 0);
  Plan plan = plan_of(index, kBackwardConfigs[index], width, groups, config.threads / 2);
  plan.blocks = std::min(params.workspace.size[0], ceil_div(params.x.size[0], plan.rows));
  return plan;
}

// Two blocks a multiprocessor, over all groups.
std::int64_t workspace_rows(std::int64_t rows, std::int64_t groups,
                            const mamba_native::cuda::DeviceInfo& device) {
  constexpr std::int64_t kBlocksPerMultiprocessor = 2;
  return std::min(rows, ceil_div(kBlocksPerMultiprocessor * device.multiprocessors, groups));
}

}  // namespace mamba_native::gated_norm::cuda
