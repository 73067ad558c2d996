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
  int warps;    // of a CTA of backward's gradients, for whose sums they need registers
};

// 16-bit types, then float32, whose tiles take twice the room. The second rows are for Turing's 64
// KB of shared memory.
inline constexpr Config kConfigs16[] = {{64, 64, 128, 16}, {32, 32, 128, 8}, {32, 32, 256, 8}};
inline constexpr Config kConfigs32[] = {{32, 32, 128, 16}, {16, 16, 128, 8}, {16, 16, 256, 8}};
inline constexpr int kConfigCount = 3;

constexpr const Config& config_of(int index, std::int64_t element) {
  return element == 2 ? kConfigs16[index] : kConfigs32[index];
}

// Bytes of a tile with rows padded as kRowStride of tensors.cuh says.
constexpr std::int64_t tile_bytes(std::int64_t rows, std::int64_t columns, std::int64_t element) {
  return rows * (columns * element + 16);
}

// Shared memory of a forward CTA in bytes: C, the state, the scores, scaled x, decays for two
// chunks and what else ForwardTiles of forward.cuh has; for every stage x and B.
constexpr std::int64_t forward_shared_memory(const Config& c, std::int64_t element, int stages) {
  constexpr std::int64_t kFloat = sizeof(float);
  const std::int64_t decays = (element == 2 ? 2 * c.steps + 1 : 3 * c.steps) * kFloat;
  const std::int64_t chunk = (12 + decays + 7) / 8 * 8;
  const std::int64_t small = 2 * chunk + 40;
  const std::int64_t x = tile_bytes(c.steps, c.headdim, element);
  const std::int64_t B = tile_bytes(c.steps, c.states, element);
  return B + tile_bytes(c.headdim, c.states, element) + tile_bytes(c.steps, c.steps, element) + x +
         (small + 15) / 16 * 16 + stages * (x + B);
}

// Shared memory of backward's CTAs in bytes. States between chunks: x or g, B or C, the state, the
// decays.
constexpr std::int64_t states_shared_memory(const Config& c, std::int64_t element) {
  return tile_bytes(c.steps, c.headdim, element) + tile_bytes(c.steps, c.states, element) +
         tile_bytes(c.headdim, c.states, element) +
         3 * c.steps * static_cast<std::int64_t>(sizeof(float));
}
// Gradients of chunks: B, C, the scores, sums over the warps (HeadSums of backward.cuh), and for
// every head that is there at once, a stage, two states, x, g and the decays.
constexpr std::int64_t gradients_shared_memory(const Config& c, std::int64_t element, int stages) {
  const std::int64_t row_blocks = c.steps / 16;
  const std::int64_t pair_sum = element == 2 ? 1 : 2;  // a float, or a double
  const std::int64_t sums = (c.warps / row_blocks) * (pair_sum + 1) * c.steps +
                            (row_blocks * pair_sum + 1) * c.steps + c.warps;
  const std::int64_t decays = element == 2 ? 2 * c.steps + 4 : 3 * c.steps;
  constexpr std::int64_t kFloat = sizeof(float);
  return 2 * tile_bytes(c.steps, c.states, element) + tile_bytes(c.steps, c.steps, element) +
         sums * kFloat +
         stages * (2 * tile_bytes(c.headdim, c.states, element) +
                   2 * tile_bytes(c.steps, c.headdim, element) + decays * kFloat);
}

// Index of the row to run. `forced` < 0 leaves the choice to the rules; otherwise it is returned if
// that row can run the problem, and Error says why if it cannot.
int choose_forward(std::int64_t d_state, DType dtype, const mamba_native::cuda::DeviceInfo& device,
                   int forced = -1);

// The same for backward.
int choose_backward(std::int64_t d_state, DType dtype, const mamba_native::cuda::DeviceInfo& device,
                    int forced = -1);

// How forward cuts the work: with few heads, time falls into segments whose last states come first,
// as if each began with zero; then every segment carries those before it on.
struct ForwardPlan {
  int config = 0;
  int stages = 1;  // chunks whose x and B a CTA holds at once
  int segments = 1;
  std::int64_t segment = 0;  // steps of one, a multiple of kCheckpointInterval if there are several
  std::int64_t states = 0, decays = 0;  // of every segment but the last, in floats of the workspace
  std::int64_t size = 0;                // of the whole workspace
};

ForwardPlan plan_forward(const Inputs& in, const mamba_native::cuda::DeviceInfo& device);
// On the device of in.x.
ForwardPlan plan_forward(const Inputs& in);

// How backward cuts the work, and where its workspace keeps what, in floats.
struct BackwardPlan {
  int config = 0;
  int stages = 1;            // heads that a CTA of the gradients holds at once
  int shares = 1;            // CTAs that divide a group's heads among them
  std::int64_t stretch = 0;  // steps whose states and adjoints the workspace holds at once
  std::int64_t row = 0;      // states, padded to 16 bytes in the dtype
  std::int64_t dA = 0, ddt_bias = 0, dD = 0;  // a part for every chunk; for dD see DParts
  std::int64_t carry = 0;                     // the adjoint between two stretches
  std::int64_t entering = 0, leaving = 0;     // states before, adjoints after every chunk
  std::int64_t dB = 0, dC = 0;                // a part for every share, if there are several
  std::int64_t size = 0;                      // of the whole workspace
};

// The parts of dD: for every chunk and head a number per 16 x 16 block of (steps, channels) of a
// tile, or one per channel for every 16 steps of a chunk.
struct DParts {
  std::int64_t rows;  // of heads, for every chunk
  std::int64_t columns;
};
constexpr DParts d_parts(const Config& c, bool per_channel, std::int64_t headdim) {
  return per_channel ? DParts{c.steps / 16, headdim}
                     : DParts{1, static_cast<std::int64_t>(c.steps / 16) * (c.headdim / 16)};
}

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
