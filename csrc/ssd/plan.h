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

// Index of the row to run. `forced` < 0 leaves the choice to the rules; otherwise it is returned if
// that row can run the problem, and Error says why if it cannot.
int choose_forward(std::int64_t d_state, DType dtype, const mamba_native::cuda::DeviceInfo& device,
                   int forced = -1);

// "chunks of 64 steps, 64 channels, 128 states".
std::string describe(const Config& config);

namespace cuda {

// T is float, Half or BFloat16: the dtype of params.in.x. Parameters are validated, time is in the
// order of the scan, and no size is zero.
template <class T>
void forward(const ForwardParams& params);

}  // namespace cuda
}  // namespace mamba_native::ssd
