#include "causal_conv1d/plan.h"

#include <algorithm>

#include "core/error.h"
#include "core/math.h"

namespace mamba_native::causal_conv1d {

bool is_channel_last(const TensorView& x) {
  if (x.size[2] <= 1) {
    return true;  // one step: all that is left to run along are the channels
  }
  if (x.stride[2] == 1 || x.size[1] == 1) {
    return false;
  }
  return x.stride[1] == 1 || x.stride[1] < x.stride[2];
}

namespace cuda {
namespace {

constexpr int kWarp = 32;

std::int64_t power_of_two_from(std::int64_t count) {
  std::int64_t power = 1;
  while (power < count) {
    power *= 2;
  }
  return power;
}

// The first row of the table that is for the width, runs along x's axis and whose vectors suit x;
// if none does, the first of that axis, which then moves single elements.
template <int COUNT>
int choose_row(const Config (&configs)[COUNT], const Inputs& in, int forced) {
  if (forced >= 0) {
    MAMBA_CHECK(forced < COUNT, "causal_conv1d: there is no kernel ", forced, " of ", COUNT);
    return forced;
  }
  const std::int64_t width = in.weight.size[1];
  const bool along_time = width <= kWidestOwnKernel && !is_channel_last(in.x);
  const Axis axis = along_time ? Axis::time : Axis::channels;
  const bool any_width = !along_time && width != kWidestOwnKernel;
  int first = -1;
  for (int i = 0; i < COUNT; ++i) {
    if (configs[i].axis != axis || configs[i].any_width != any_width) {
      continue;
    }
    if (moves_vectors(in.x, configs[i])) {
      return i;
    }
    first = first < 0 ? i : first;
  }
  return first;
}

// `most_lanes` bounds blockDim.x, `most_steps` the work of a thread, which shrinks until the device
// is full.
Plan make_plan(const Config& config, int row, const Inputs& in,
               const mamba_native::cuda::DeviceInfo& device, std::int64_t most_lanes,
               std::int64_t most_steps, std::int64_t least_steps) {
  constexpr std::int64_t kMaxGridX = 0x7fffffff;
  constexpr std::int64_t kWarpsPerMultiprocessor = 32;
  const std::int64_t batch = in.x.size[0];
  const std::int64_t channels = in.x.size[1];
  const std::int64_t length = in.x.size[2];
  const std::int64_t items = config.items(size_of(in.x.dtype));
  const std::int64_t wanted = kWarpsPerMultiprocessor * kWarp * device.multiprocessors;
  const bool along_time = config.axis == Axis::time;

  Plan plan;
  plan.config = row;
  plan.batches = std::min(batch, kMaxGridY);
  const std::int64_t vectors =
      std::max<std::int64_t>(ceil_div(along_time ? length : channels, items), 1);
  const std::int64_t others = std::max<std::int64_t>(along_time ? channels : length, 1);
  plan.lanes = static_cast<int>(std::min(most_lanes, power_of_two_from(vectors)));
  plan.steps = most_steps;
  while (plan.steps > least_steps && vectors * others / plan.steps * batch < wanted) {
    plan.steps /= 2;
  }
  const std::int64_t groups_needed = along_time ? others : ceil_div(others, plan.steps);
  // Whole warps, because backward exchanges values between the lanes of a full one.
  plan.groups = static_cast<int>(std::max<std::int64_t>(
      kWarp / plan.lanes,
      std::min<std::int64_t>(kMaxThreads / plan.lanes, power_of_two_from(groups_needed))));
  std::int64_t channel_blocks = 0;
  if (along_time) {
    plan.segments = ceil_div(vectors, plan.lanes * plan.steps);
    channel_blocks = ceil_div(channels, plan.groups);
  } else {
    plan.segments = ceil_div(others, plan.groups * plan.steps);
    channel_blocks = ceil_div(vectors, plan.lanes);
  }
  plan.blocks = plan.segments * channel_blocks;
  MAMBA_CHECK(plan.blocks <= kMaxGridX, "causal_conv1d: ", plan.blocks,
              " thread blocks exceed CUDA's grid; split the tensors");
  return plan;
}

}  // namespace

bool moves_vectors(const TensorView& tensor, const Config& config) {
  constexpr std::int64_t kLargestVector = 16;
  const int along = config.axis == Axis::time ? 2 : 1;
  const int across = 3 - along;
  const std::int64_t element = size_of(tensor.dtype);
  const std::int64_t bytes = std::min(config.items(element) * element, kLargestVector);
  // A stride that only a size of one uses says nothing.
  return tensor.stride[along] == 1 &&
         static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(tensor.data)) % bytes == 0 &&
         (tensor.size[0] <= 1 || tensor.stride[0] * element % bytes == 0) &&
         (tensor.size[across] <= 1 || tensor.stride[across] * element % bytes == 0);
}

std::string describe(const Config& config) {
  return text("vectors along ", config.axis == Axis::time ? "time" : "the channels", ": ",
              config.items_of_2_bytes, " of 16 bits, ", config.items_of_4_bytes, " of 32",
              config.any_width ? ", any width" : "");
}

Plan choose_forward(const Inputs& in, const mamba_native::cuda::DeviceInfo& device, int forced) {
  const int row = choose_row(kForwardConfigs, in, forced);
  const Config& config = kForwardConfigs[row];
  // 12, 24 and 48 steps are whole groups of the 3 or 4 rows that a thread has in flight.
  return config.axis == Axis::time ? make_plan(config, row, in, device, kMaxThreads, 1, 1)
                                   : make_plan(config, row, in, device, kWarp, 48, 12);
}

// Backward threads of a warp sum their shares of dweight, so its lanes do not leave the warp.
Plan choose_backward(const Inputs& in, const mamba_native::cuda::DeviceInfo& device, bool ordered,
                     int forced) {
  const int row = choose_row(kBackwardConfigs, in, forced);
  const Config& config = kBackwardConfigs[row];
  Plan plan = config.axis == Axis::time ? make_plan(config, row, in, device, kWarp, 8, 1)
                                        : make_plan(config, row, in, device, kWarp, 64, 8);
  if (ordered) {
    constexpr std::int64_t kColumnsPerRow = 64;  // of x, for each row of the workspace
    const std::int64_t columns = in.x.size[0] * in.x.size[2];
    plan.batches = std::min(plan.batches, std::max<std::int64_t>(columns / kColumnsPerRow, 1));
  }
  return plan;
}

}  // namespace cuda
}  // namespace mamba_native::causal_conv1d
