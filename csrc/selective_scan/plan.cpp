#include "selective_scan/plan.h"

#include <algorithm>

#include "core/error.h"
#include "core/math.h"

namespace mamba_native::selective_scan {
namespace {

using mamba_native::cuda::DeviceInfo;

// Share of the work of `parts`-wide blocks that falls on nothing, as total / useful.
double padding(std::int64_t size, std::int64_t parts) {
  return static_cast<double>(ceil_div(size, parts) * parts) / static_cast<double>(size);
}

std::int64_t channels_per_block(const ForwardConfig& config) {
  return config.threads / config.lanes;
}

// Why a row cannot run a problem; null if it can.
const char* refusal(const ForwardConfig& config, const Problem& problem) {
  if (config.mapping == Mapping::lanes) {
    return nullptr;
  }
  if (!problem.time_varying) {
    return "it needs time-varying B and C";
  }
  return problem.d_state > kSerialStates ? "it holds 16 states at most" : nullptr;
}

const char* refusal(const BackwardConfig& config, const Problem& problem,
                    const DeviceInfo& device) {
  return backward_shared_memory(config.warps, problem.d_state) > device.shared_memory_per_block
             ? "its shared memory does not hold that many states"
             : nullptr;
}

template <class Config, std::size_t COUNT>
void check_index(const char* direction, const Config (&configs)[COUNT], int index) {
  if (index < static_cast<int>(COUNT)) {
    return;
  }
  std::string rows;
  for (std::size_t i = 0; i < COUNT; ++i) {
    rows += text("\n  ", i, "  ", describe(configs[i]));
  }
  fail("selective_scan: ", direction, " config ", index, " does not exist; there are", rows);
}

template <class Config>
[[noreturn]] void fail_config(const char* direction, int index, const Config& config,
                              const char* reason) {
  fail("selective_scan: ", direction, " config ", index, " (", describe(config),
       ") cannot run this problem: ", reason);
}

}  // namespace

Problem problem_of(const Inputs& in) {
  Problem problem;
  problem.batch = in.u.size[0];
  problem.channels = in.u.size[1];
  problem.length = in.u.size[2];
  problem.d_state = in.A.size[1];
  problem.time_varying = in.B.dim == 4 && in.C.dim == 4;
  problem.groups = in.B.dim == 4 ? in.B.size[1] : in.C.dim == 4 ? in.C.size[1] : 1;
  return problem;
}

std::string describe(const ForwardConfig& config) {
  return text(config.mapping == Mapping::serial ? "serial" : "lanes over time", ": ",
              config.threads, " threads, ", config.lanes, " lanes per channel, tiles of ",
              config.tile, " steps, ", config.states, " states at once");
}

std::string describe(const BackwardConfig& config) {
  return text("lanes over time: ", config.warps, " channels per CTA, ", config.blocks,
              " CTAs per multiprocessor");
}

int choose_forward(const Problem& problem, const DeviceInfo& device, int forced) {
  if (forced >= 0) {
    check_index("forward", kForwardConfigs, forced);
    const ForwardConfig& config = kForwardConfigs[forced];
    const char* reason = refusal(config, problem);
    if (reason != nullptr) {
      fail_config("forward", forced, config, reason);
    }
    return forced;
  }
  // The last row runs anything.
  constexpr int kLanesOverTime = kForwardConfigCount - 1;
  static_assert(kForwardConfigs[kLanesOverTime].mapping == Mapping::lanes, "no limits");

  // A whole warp per channel pays when there are too few channels for eight lanes each to fill the
  // device, and when the tile's idle steps do not eat the gain.
  const double rows = static_cast<double>(problem.batch) * static_cast<double>(problem.channels);
  const double wanted_lanes = 450.0 * device.multiprocessors / rows;
  const double idle = padding(problem.length, kForwardConfigs[kLanesOverTime].tile);
  if (wanted_lanes > 28.0 && idle < 1.5) {
    return kLanesOverTime;
  }
  // Padding a d_state below 8 to 16 costs more than the warp's scan over its lanes.
  if (problem.d_state < kSerialStates / 2 && idle < 1.5) {
    return kLanesOverTime;
  }
  // The row whose lanes are nearest to those wanted, on a logarithmic scale; more lanes where a
  // group is too small to fill a CTA.
  for (int i = 0; i < kLanesOverTime; ++i) {
    const ForwardConfig& config = kForwardConfigs[i];
    const bool most_lanes = config.lanes == 8;
    if (config.mapping == Mapping::serial && (most_lanes || wanted_lanes < 1.414 * config.lanes) &&
        refusal(config, problem) == nullptr &&
        padding(problem.channels_per_group(), channels_per_block(config)) <= 1.5) {
      return i;
    }
  }
  return kLanesOverTime;
}

int choose_backward(const Problem& problem, const DeviceInfo& device, int forced) {
  if (forced >= 0) {
    check_index("backward", kBackwardConfigs, forced);
    const BackwardConfig& config = kBackwardConfigs[forced];
    const char* reason = refusal(config, problem, device);
    if (reason != nullptr) {
      fail_config("backward", forced, config, reason);
    }
    return forced;
  }
  constexpr int kLast = kBackwardConfigCount - 1;
  for (int i = 0; i < kLast; ++i) {
    // Rows go from many channels per CTA to one; take the next if it holds the whole group.
    const bool too_wide = problem.channels_per_group() <= kBackwardConfigs[i + 1].warps;
    if (!too_wide && refusal(kBackwardConfigs[i], problem, device) == nullptr) {
      return i;
    }
  }
  const char* reason = refusal(kBackwardConfigs[kLast], problem, device);
  if (reason != nullptr) {
    fail_config("backward", kLast, kBackwardConfigs[kLast], reason);
  }
  return kLast;
}

}  // namespace mamba_native::selective_scan
