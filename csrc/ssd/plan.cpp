#include "ssd/plan.h"

#include <algorithm>

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

// The first of `rows` rows of a table from row `first` on that can run, or `forced`.
using SharedMemory = std::int64_t (*)(const Config&, std::int64_t element);
int choose(const char* op, int first, int rows, SharedMemory shared_memory, std::int64_t d_state,
           DType dtype, const DeviceInfo& device, int forced) {
  const std::int64_t element = size_of(dtype);
  std::string reasons;
  for (int i = 0; i < rows; ++i) {
    const Config& config = config_of(first + i, element);
    const std::string reason = refusal(config, d_state, shared_memory(config, element), device);
    if (reason.empty() && (forced < 0 || forced == i)) {
      return i;
    }
    reasons += text("\n  ", i, "  ", describe(config), ": ", reason.empty() ? "can" : reason);
  }
  fail(op, forced < 0 ? text(": no kernel takes") : text(": config ", forced, " does not take"),
       " d_state ", d_state, " in ", name(dtype), " on this device; there are", reasons);
}

}  // namespace

std::string describe(const Config& config) {
  return text("chunks of ", config.steps, " steps, ", config.headdim, " channels, ", config.states,
              " states");
}

int choose_forward(std::int64_t d_state, DType dtype, const DeviceInfo& device, int forced) {
  return choose("ssd_forward", 0, kConfigCount, &forward_shared_memory, d_state, dtype, device,
                forced);
}

int choose_backward(std::int64_t d_state, DType dtype, const DeviceInfo& device, int forced) {
  return choose("ssd_backward", kFirstBackwardConfig, kBackwardConfigCount,
                &gradients_shared_memory, d_state, dtype, device, forced);
}

BackwardPlan plan_backward(const BackwardParams& params, const DeviceInfo& device) {
  const TensorView& x = params.in.x;
  const std::int64_t batch = x.size[0], length = x.size[1], heads = x.size[2], P = x.size[3];
  const std::int64_t groups = params.in.B.size[2], N = params.in.B.size[3];
  const std::int64_t element = size_of(x.dtype);
  BackwardPlan plan;
  plan.config = choose_backward(N, x.dtype, device);
  const std::int64_t steps = backward_config(plan.config, element).steps;
  plan.row = ceil_div(N * element, 16) * 16 / element;

  const std::int64_t window = batch * heads * P * plan.row * element / 4;  // floats of its states
  const std::int64_t block = 2 * window * (kCheckpointInterval / steps);
  const std::int64_t most =
      std::max<std::int64_t>(1, kStretchBytes / static_cast<std::int64_t>(sizeof(float)) / block);
  const std::int64_t blocks = ceil_div(length, kCheckpointInterval);
  plan.stretch = std::min(length, std::min(most, blocks) * kCheckpointInterval);

  const std::int64_t windows = ceil_div(plan.stretch, steps);
  const std::int64_t wanted = 2 * device.multiprocessors / (batch * windows * groups);
  plan.shares =
      static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(wanted, heads / groups)));

  const auto take = [&plan](std::int64_t floats) {
    const std::int64_t at = plan.size;
    plan.size += ceil_div(floats, 4) * 4;  // sections begin at multiples of 16 bytes
    return at;
  };
  const std::int64_t rows = batch * ceil_div(length, steps) * heads;
  plan.dA = take(rows);
  plan.ddt_bias = take(rows);
  plan.dD = take(params.in.D.present() ? rows * P : 0);
  plan.carry = take(plan.stretch < length ? batch * heads * P * N : 0);
  plan.entering = take(windows * window);
  plan.leaving = take(windows * window);
  const std::int64_t part = plan.shares > 1 ? plan.shares * batch * plan.stretch * groups * N : 0;
  plan.dB = take(part);
  plan.dC = take(part);
  return plan;
}

#if MAMBA_WITH_CUDA
BackwardPlan plan_backward(const BackwardParams& params) {
  return plan_backward(params, mamba_native::cuda::device_info(params.in.x.device.index));
}
#endif

}  // namespace mamba_native::ssd
