#include "ssd/plan.h"

#include <algorithm>
#include <cstdint>

#include "core/error.h"
#include "core/math.h"

namespace mamba_native::ssd {
namespace {

using mamba_native::cuda::DeviceInfo;

// Why a row cannot run a problem; empty if it can.
std::string refusal(const Config& config, std::int64_t d_state, std::int64_t shared_memory,
                    const DeviceInfo& device) {
  if (d_state > config.states) {
    return text("it holds ", config.states, " states at most");
  }
  if (shared_memory > device.shared_memory_per_block) {
    return text("it needs ", shared_memory, " bytes of shared memory, the device has ",
                device.shared_memory_per_block);
  }
  return "";
}

// The first row of a table that can run, or `forced`.
using SharedMemory = std::int64_t (*)(const Config&, std::int64_t element);
int choose(const char* op, SharedMemory shared_memory, std::int64_t d_state, DType dtype,
           const DeviceInfo& device, int forced) {
  const std::int64_t element = size_of(dtype);
  std::string reasons;
  for (int i = 0; i < kConfigCount; ++i) {
    const Config& config = config_of(i, element);
    const std::string reason = refusal(config, d_state, shared_memory(config, element), device);
    if (reason.empty() && (forced < 0 || forced == i)) {
      return i;
    }
    reasons += text("\n  ", i, "  ", describe(config), ": ", reason.empty() ? "can" : reason);
  }
  fail(op, forced < 0 ? text(": no kernel takes") : text(": config ", forced, " does not take"),
       " d_state ", d_state, " in ", name(dtype), " on this device (sm_", device.major,
       device.minor, "); there are", reasons);
}

std::int64_t forward_with_one_stage(const Config& config, std::int64_t element) {
  return forward_shared_memory(config, element, 1);
}
std::int64_t gradients_with_one_stage(const Config& config, std::int64_t element) {
  return gradients_shared_memory(config, element, 1);
}

// Room for sections of a workspace in floats, which begin at multiples of 16 bytes.
std::int64_t take(std::int64_t& size, std::int64_t floats) {
  const std::int64_t at = size;
  size += ceil_div(floats, 4) * 4;
  return at;
}

// How many CTAs divide a group's heads, for `ctas` without division: what ends first, when
// `multiprocessors` have one at a time and each begins and ends with about two heads' work.
int choose_shares(std::int64_t ctas, std::int64_t heads, std::int64_t multiprocessors) {
  constexpr std::int64_t kMost = 32;  // dB and dC have a part for each
  std::int64_t best = 1, best_time = INT64_MAX;
  for (std::int64_t shares = 1; shares <= std::min(heads, kMost); ++shares) {
    const std::int64_t time =
        ceil_div(ctas * shares, multiprocessors) * (ceil_div(heads, shares) + 2);
    if (time < best_time) {
      best = shares;
      best_time = time;
    }
  }
  return static_cast<int>(best);
}

}  // namespace

std::string describe(const Config& config) {
  return text("chunks of ", config.steps, " steps, ", config.headdim, " channels, ", config.states,
              " states");
}

int choose_forward(std::int64_t d_state, DType dtype, const DeviceInfo& device, int forced) {
  return choose("ssd_forward", &forward_with_one_stage, d_state, dtype, device, forced);
}

int choose_backward(std::int64_t d_state, DType dtype, const DeviceInfo& device, int forced) {
  return choose("ssd_backward", &gradients_with_one_stage, d_state, dtype, device, forced);
}

ForwardPlan plan_forward(const Inputs& in, const DeviceInfo& device) {
  const std::int64_t batch = in.x.size[0], length = in.x.size[1], heads = in.x.size[2];
  const std::int64_t P = in.x.size[3], N = in.B.size[3];
  const std::int64_t element = size_of(in.x.dtype);
  ForwardPlan plan;
  plan.config = choose_forward(N, in.x.dtype, device, in.config);
  plan.segment = length;
  const Config& config = config_of(plan.config, element);
  const std::int64_t ctas = batch * heads * ceil_div(P, config.headdim);
  // Two CTAs fill each other's waits, which is worth more than a second stage.
  const auto fit = [&](int ctas_at_once, int stages) {
    return ctas_at_once * forward_shared_memory(config, element, stages) <
           device.shared_memory_per_block;
  };
  plan.stages = fit(2, 2) || (!fit(2, 1) && fit(1, 2)) ? 2 : 1;
  const std::int64_t wanted =
      (fit(2, 1) ? 2 : 1) * device.multiprocessors / std::max(ctas, std::int64_t{1});
  constexpr std::int64_t kFewest = 2;  // blocks of a segment; fewer are not worth a launch
  const std::int64_t blocks = ceil_div(length, kCheckpointInterval);
  const std::int64_t segments = std::min(wanted, blocks / kFewest);
  if (segments > 1) {
    plan.segment = ceil_div(blocks, segments) * kCheckpointInterval;
    plan.segments = static_cast<int>(ceil_div(length, plan.segment));
    plan.states = take(plan.size, (plan.segments - 1) * batch * heads * P * N);
    plan.decays = take(plan.size, (plan.segments - 1) * batch * heads);
  }
  return plan;
}

BackwardPlan plan_backward(const BackwardParams& params, const DeviceInfo& device) {
  const TensorView& x = params.in.x;
  const std::int64_t batch = x.size[0], length = x.size[1], heads = x.size[2], P = x.size[3];
  const std::int64_t groups = params.in.B.size[2], N = params.in.B.size[3];
  const std::int64_t element = size_of(x.dtype);
  BackwardPlan plan;
  plan.config = choose_backward(N, x.dtype, device, params.in.config);
  const Config& config = config_of(plan.config, element);
  const std::int64_t steps = config.steps;
  plan.stages =
      gradients_shared_memory(config, element, 2) <= device.shared_memory_per_block ? 2 : 1;
  plan.row = ceil_div(N * element, 16) * 16 / element;

  const std::int64_t window = batch * heads * P * plan.row * element / 4;  // floats of its states
  const std::int64_t block = 2 * window * (kCheckpointInterval / steps);
  const std::int64_t most =
      std::max<std::int64_t>(1, kStretchBytes / static_cast<std::int64_t>(sizeof(float)) / block);
  const std::int64_t blocks = ceil_div(length, kCheckpointInterval);
  plan.stretch = std::min(length, std::min(most, blocks) * kCheckpointInterval);

  const std::int64_t windows = ceil_div(plan.stretch, steps);
  plan.shares = choose_shares(batch * windows * groups, heads / groups, device.multiprocessors);

  const std::int64_t rows = batch * ceil_div(length, steps) * heads;
  const DParts d = d_parts(config, params.in.D.dim == 2, P);
  const std::int64_t part = plan.shares > 1 ? plan.shares * batch * plan.stretch * groups * N : 0;
  plan.dA = take(plan.size, rows);
  plan.ddt_bias = take(plan.size, rows);
  plan.dD = take(plan.size, params.in.D.present() ? rows * d.rows * d.columns : 0);
  plan.carry = take(plan.size, plan.stretch < length ? batch * heads * P * N : 0);
  plan.entering = take(plan.size, windows * window);
  plan.leaving = take(plan.size, windows * window);
  plan.dB = take(plan.size, part);
  plan.dC = take(plan.size, part);
  return plan;
}

#if MAMBA_WITH_CUDA
ForwardPlan plan_forward(const Inputs& in) {
  return plan_forward(in, mamba_native::cuda::device_info(in.x.device.index));
}

BackwardPlan plan_backward(const BackwardParams& params) {
  return plan_backward(params, mamba_native::cuda::device_info(params.in.x.device.index));
}
#endif

}  // namespace mamba_native::ssd
