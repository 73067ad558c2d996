#include "ssd/plan.h"

#include "core/error.h"

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

}  // namespace

std::string describe(const Config& config) {
  return text("chunks of ", config.steps, " steps, ", config.headdim, " channels, ", config.states,
              " states");
}

int choose_forward(std::int64_t d_state, DType dtype, const DeviceInfo& device, int forced) {
  const std::int64_t element = size_of(dtype);
  std::string reasons;
  for (int i = 0; i < kConfigCount; ++i) {
    const Config& config = config_of(i, element);
    const std::string reason =
        refusal(config, d_state, forward_shared_memory(config, element), device);
    if (reason.empty() && (forced < 0 || forced == i)) {
      return i;
    }
    reasons += text("\n  ", i, "  ", describe(config), ": ", reason.empty() ? "can" : reason);
  }
  fail("ssd_forward: ", forced < 0 ? text("no kernel") : text("config ", forced, " cannot"),
       " for d_state ", d_state, " in ", name(dtype), " on this device; there are", reasons);
}

}  // namespace mamba_native::ssd
