// Which kernel runs a chunked scan on a CUDA device: the tables of kernels that exist and the rules
// that pick a row. Plain C++, tested without a GPU.
#pragma once

#include <cstdint>
#include <string>

#include "core/cuda/device.h"
#include "ssd/ssd.h"

namespace mamba_native::ssd {

// Shapes of the tiles that a CTA works on. One row = one kernel per dtype.
struct Config {
  int steps;    // of a chunk
  int headdim;  // channels of a head at once
  int states;   // d_state up to this
};

// 16-bit types, then float32, whose tiles take twice the room.
inline constexpr Config kConfigs16[] = {{64, 64, 64}, {64, 64, 128}, {32, 32, 256}};
inline constexpr Config kConfigs32[] = {{32, 32, 64}, {32, 32, 128}, {16, 16, 256}};
inline constexpr int kConfigCount = 3;

constexpr const Config& config_of(int index, std::int64_t element) {
  return element == 2 ? kConfigs16[index] : kConfigs32[index];
}

// Bytes of a tile with rows padded as kRowStride of tensors.cuh says.
constexpr std::int64_t tile_bytes(std::int64_t rows, std::int64_t columns, std::int64_t element) {
  return rows * (columns * element + 16);
}

// Shared memory of a forward CTA in bytes: x and scaled x, B, C, the state, the scores, and the
// decays.
constexpr std::int64_t forward_shared_memory(const Config& c, std::int64_t element) {
  return 2 * tile_bytes(c.steps, c.headdim, element) + 2 * tile_bytes(c.steps, c.states, element) +
         tile_bytes(c.headdim, c.states, element) + tile_bytes(c.steps, c.steps, element) +
         3 * c.steps * static_cast<std::int64_t>(sizeof(float));
}

// Backward has the rows of the tables from this one on: fewer states leave warps idle instead.
inline constexpr int kFirstBackwardConfig = 1;
inline constexpr int kBackwardConfigCount = kConfigCount - kFirstBackwardConfig;

constexpr const Config& backward_config(int index, std::int64_t element) {
  return config_of(kFirstBackwardConfig + index, element);
}

// Shared memory of backward's CTAs in bytes. States between chunks: x or g, B or C, the state, the
// decays. Chunks: B, C, two states, x, g, the scores, sums over the warps (HeadSums of
// backward.cuh), the decays.
constexpr std::int64_t states_shared_memory(const Config& c, std::int64_t element) {
  return tile_bytes(c.steps, c.headdim, element) + tile_bytes(c.steps, c.states, element) +
         tile_bytes(c.headdim, c.states, element) +
         3 * c.steps * static_cast<std::int64_t>(sizeof(float));
}
constexpr std::int64_t gradients_shared_memory(const Config& c, std::int64_t element) {
  constexpr std::int64_t kWarps = 16;
  const std::int64_t row_blocks = c.steps / 16;
  const std::int64_t sums = (2 * (kWarps / row_blocks) + row_blocks + 1) * c.steps + kWarps;
  const std::int64_t decays = (element == 2 ? 2 : 3) * c.steps + 1;
  return 2 * tile_bytes(c.steps, c.states, element) + 2 * tile_bytes(c.headdim, c.states, element) +
         2 * tile_bytes(c.steps, c.headdim, element) + tile_bytes(c.steps, c.steps, element) +
         (sums + decays) * static_cast<std::int64_t>(sizeof(float));
}

// Index of the row to run. `forced` < 0 leaves the choice to the rules; otherwise it is returned if
// that row can run the problem, and Error says why if it cannot.
int choose_forward(std::int64_t d_state, DType dtype, const mamba_native::cuda::DeviceInfo& device,
                   int forced = -1);

// The same for backward; the index counts its rows.
int choose_backward(std::int64_t d_state, DType dtype, const mamba_native::cuda::DeviceInfo& device,
                    int forced = -1);

// How backward cuts the work, and where its workspace keeps what, in floats.
struct BackwardPlan {
  int config = 0;
  int shares = 1;            // CTAs that divide a group's heads among them
  std::int64_t stretch = 0;  // steps whose states and adjoints the workspace holds at once
  std::int64_t row = 0;      // states, padded to 16 bytes in the dtype
  std::int64_t dA = 0, ddt_bias = 0, dD = 0;  // a part for every chunk
  std::int64_t carry = 0;                     // the adjoint between two stretches
  std::int64_t entering = 0, leaving = 0;     // states before, adjoints after every chunk
  std::int64_t dB = 0, dC = 0;                // a part for every share, if there are several
  std::int64_t size = 0;                      // of the whole workspace
};

// What is bounded by it: the states and adjoints of a stretch, which is kCheckpointInterval steps
// at least.
inline constexpr std::int64_t kStretchBytes = std::int64_t{256} << 20;

BackwardPlan plan_backward(const BackwardParams& params,
                           const mamba_native::cuda::DeviceInfo& device);
// On the device of params.in.x.
BackwardPlan plan_backward(const BackwardParams& params);

// "chunks of 64 steps, 64 channels, 128 states".
std::string describe(const Config& config);

namespace cuda {

// T is float, Half or BFloat16: the dtype of params.in.x. Parameters are validated, time is in the
// order of the scan, and no size is zero.
template <class T>
void forward(const ForwardParams& params);
template <class T>
void backward(const BackwardParams& params);

}  // namespace cuda
}  // namespace mamba_native::ssd
