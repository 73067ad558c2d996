#include "selective_scan/plan.h"

#include <algorithm>
#include <limits>

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

constexpr const char* kScopes[] = {"", ", reverse", ", either direction", ", packed"};

bool has(Scope scope, const Problem& problem) {
  switch (scope) {
    case Scope::plain:
      return !problem.packed && !problem.reverse && !problem.deterministic;
    case Scope::reverse:
      return !problem.packed && problem.reverse && !problem.deterministic;
    case Scope::either:
      return !problem.packed;
    case Scope::packed:
      return true;
  }
  return false;
}

constexpr char kOtherScope[] = "it is for another direction, for whole rows or for atomic sums";

// Why a row cannot run a problem; null if it can.
const char* refusal(const ForwardConfig& config, const Problem& problem) {
  if (!has(config.scope, problem)) {
    return kOtherScope;
  }
  if (config.mapping == Mapping::lanes) {
    return nullptr;
  }
  if (!problem.varying_B || !problem.varying_C) {
    return "it needs time-varying B and C";
  }
  return problem.d_state > kSerialStates ? "it holds 16 states at most" : nullptr;
}

const char* refusal(const BackwardConfig& config, const Problem& problem,
                    const DeviceInfo& device) {
  if (!has(config.scope, problem)) {
    return kOtherScope;
  }
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
  problem.d_state = in.A.size[1] * (in.is_complex() ? 2 : 1);
  problem.varying_B = is_varying(in.B);
  problem.varying_C = is_varying(in.C);
  problem.packed = in.seq_idx.present();
  problem.reverse = in.reverse;
  problem.groups = problem.varying_B ? in.B.size[1] : problem.varying_C ? in.C.size[1] : 1;
  return problem;
}

Problem problem_of(const BackwardParams& params) {
  Problem problem = problem_of(params.in);
  problem.deterministic = params.deterministic;
  return problem;
}

std::int64_t OrderedWorkspace::fixed() const {
  const int state_arrays = 2 + int{!varying_B} + int{!varying_C};
  return ceil_div(2 * channel_sums + state_arrays * state_sums, 4) * 4;  // parts are vectors of 4
}

std::int64_t OrderedWorkspace::tiles(std::int64_t floats) const {
  return tile == 0 ? std::numeric_limits<std::int64_t>::max() : (floats - fixed()) / (2 * tile);
}

OrderedWorkspace ordered_workspace(const Problem& problem, const BackwardConfig& config) {
  OrderedWorkspace out;
  out.channel_sums = problem.batch * problem.channels;
  out.state_sums = out.channel_sums * problem.d_state;
  out.blocks = ceil_div(problem.channels_per_group(), config.warps);
  out.varying_B = problem.varying_B;
  out.varying_C = problem.varying_C;
  if (out.varying_B || out.varying_C) {
    out.tile = out.blocks * problem.batch * problem.groups * problem.d_state * kCheckpointInterval;
  }
  return out;
}

std::int64_t wanted_floats(const OrderedWorkspace& workspace, std::int64_t tiles) {
  const std::int64_t tile = 2 * workspace.tile;
  const std::int64_t fit = tile == 0 ? 0 : std::max<std::int64_t>(1, kPartFloats / tile);
  return workspace.fixed() + std::min(tiles, fit) * tile;
}

std::string describe(const ForwardConfig& config) {
  return text(config.mapping == Mapping::serial ? "serial" : "lanes over time", ": ",
              config.threads, " threads, ", config.lanes, " lanes per channel, tiles of ",
              config.tile, " steps, ", config.states, " states at once",
              kScopes[static_cast<int>(config.scope)]);
}

std::string describe(const BackwardConfig& config) {
  return text("lanes over time: ", config.warps, " channels per CTA, ", config.blocks,
              " CTAs per multiprocessor", kScopes[static_cast<int>(config.scope)]);
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
  // Rows are sorted by scope, the narrowest first, and of each scope the last one runs anything.
  int first = 0;
  while (!has(kForwardConfigs[first].scope, problem)) {
    ++first;
  }
  int lanes_over_time = first;
  while (kForwardConfigs[lanes_over_time].mapping != Mapping::lanes) {
    ++lanes_over_time;
  }

  // A whole warp per channel pays when there are too few channels for eight lanes each to fill the
  // device, and when the tile's idle steps do not eat the gain.
  const double rows = static_cast<double>(problem.batch) * static_cast<double>(problem.channels);
  const double wanted_lanes = 450.0 * device.multiprocessors / rows;
  const double idle = padding(problem.length, kForwardConfigs[lanes_over_time].tile);
  if (wanted_lanes > 28.0 && idle < 1.5) {
    return lanes_over_time;
  }
  // Padding a d_state below 8 to 16 costs more than the warp's scan over its lanes.
  if (problem.d_state < kSerialStates / 2 && idle < 1.5) {
    return lanes_over_time;
  }
  // The row whose lanes are nearest to those wanted, on a logarithmic scale; more lanes where a
  // group is too small to fill a CTA.
  for (int i = first; i < lanes_over_time; ++i) {
    const ForwardConfig& config = kForwardConfigs[i];
    const bool most_lanes = i + 1 == lanes_over_time;
    if ((most_lanes || wanted_lanes < 1.414 * config.lanes) &&
        refusal(config, problem) == nullptr &&
        padding(problem.channels_per_group(), channels_per_block(config)) <= 1.5) {
      return i;
    }
  }
  return lanes_over_time;
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
  // Rows are sorted by scope, the narrowest first, and then go from many channels per CTA to one.
  // The next one is taken if it holds the whole group, or where a row does not fit.
  int row = 0;
  while (!has(kBackwardConfigs[row].scope, problem)) {
    ++row;
  }
  while (row + 1 < kBackwardConfigCount) {
    const BackwardConfig& next = kBackwardConfigs[row + 1];
    const bool too_wide =
        next.scope == kBackwardConfigs[row].scope && problem.channels_per_group() <= next.warps;
    if (!too_wide && refusal(kBackwardConfigs[row], problem, device) == nullptr) {
      break;
    }
    ++row;
  }
  const char* reason = refusal(kBackwardConfigs[row], problem, device);
  if (reason != nullptr) {
    fail_config("backward", row, kBackwardConfigs[row], reason);
  }
  return row;
}

}  // namespace mamba_native::selective_scan
