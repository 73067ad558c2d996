// How CUDA picks a kernel. Plain C++, tested without a GPU. Not public; parameters are validated.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/cuda/device.h"
#include "state_update/state_update.h"

namespace mamba_native::state_update::cuda {

// One row = one kernel for float32 states and one for 16-bit states. A warp spreads a state row
// (one p, N values) over `lanes` lanes of 16 bytes each, so it loads 32 / lanes rows with one
// instruction and keeps `rows` such loads in flight. `tied` kernels know one decay for the whole
// head. Row 0, without lanes, reads element by element and takes any strides.
struct Config {
  int lanes;
  int rows;
  bool tied;
};

inline constexpr Config kConfigs[] = {
    {0, 1, false},   // any strides, alignment and N
    {2, 2, false},   // Mamba-1 with a 16-bit state: N = 16
    {4, 4, false},   // Mamba-1 with a float32 state
    {8, 4, false},   // larger N with a decay for every element
    {16, 4, false},  //
    {32, 4, false},  // also any N beyond one row of lanes
    {8, 8, true},    // Mamba-2, N = 64 with a 16-bit state
    {16, 8, true},   // Mamba-2, N = 128 with a 16-bit state, N = 64 in float32
    {32, 8, true},   // Mamba-2, N = 256 with a 16-bit state, N = 128 in float32
};
inline constexpr std::size_t kConfigCount = sizeof(kConfigs) / sizeof(kConfigs[0]);

// Rows p that one warp updates.
constexpr int rows_of_warp(const Config& config) {
  return config.lanes == 0 ? 1 : 32 / config.lanes * config.rows;
}

struct Plan {
  int config;  // row of kConfigs
  int warps;   // of a thread block
};

// True when the decay is one number a head: A, dt and dt_bias do not vary over P, nor A over N.
bool is_tied(const Params& params);

Plan choose(const Params& params, const mamba_native::cuda::DeviceInfo& device);

void update(const Params& params, const Plan& plan);

}  // namespace mamba_native::state_update::cuda
