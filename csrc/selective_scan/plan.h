// Which kernel runs a scan on a CUDA device: the tables of kernels that exist and the rules that
// pick a row. Plain C++, tested without a GPU.
#pragma once

#include <cstdint>
#include <string>

#include "core/cuda/device.h"
#include "selective_scan/selective_scan.h"

namespace mamba_native::selective_scan {

// What the choice depends on. All sizes are positive.
struct Problem {
  std::int64_t batch = 1;
  std::int64_t channels = 1;
  std::int64_t length = 1;
  std::int64_t d_state = 1;
  std::int64_t groups = 1;
  bool time_varying = true;  // both B and C are (B, G, N, L)

  std::int64_t channels_per_group() const { return channels / groups; }
};

Problem problem_of(const Inputs& in);

// The two ways to spread a scan over threads; the room's README derives them.
enum class Mapping { serial, lanes };

struct ForwardConfig {
  Mapping mapping;
  int threads;  // of a CTA
  int lanes;    // threads that share one channel
  int tile;     // steps that a CTA holds at once
  int states;   // states that a thread advances together: all of its own, or of those in turn
  int blocks;   // CTAs that the register budget keeps on one multiprocessor
};

// One row = one kernel per dtype.
inline constexpr ForwardConfig kForwardConfigs[] = {
    {Mapping::serial, 128, 2, 32, 8, 3},   // from about 20,000 channels over the batch on
    {Mapping::serial, 128, 4, 32, 4, 4},   // from about 10,000
    {Mapping::serial, 128, 8, 64, 2, 3},   // from about 2,000
    {Mapping::lanes, 128, 32, 256, 1, 4},  // fewer, d_state below 8 or above 16, static B or C
};
inline constexpr int kForwardConfigCount =
    static_cast<int>(sizeof(kForwardConfigs) / sizeof(kForwardConfigs[0]));

// The serial mapping keeps this many states of a channel in registers; a smaller d_state is padded.
inline constexpr std::int64_t kSerialStates = 16;

struct BackwardConfig {
  int warps;   // of a CTA: each has one channel of the CTA's group
  int blocks;  // CTAs that the register budget keeps on one multiprocessor
};

inline constexpr BackwardConfig kBackwardConfigs[] = {
    {8, 2},   // groups of more than 4 channels: one global atomic per 8 channels
    {4, 3},   // groups of 2 to 4
    {1, 12},  // groups of one channel, and d_state in the thousands
};
inline constexpr int kBackwardConfigCount =
    static_cast<int>(sizeof(kBackwardConfigs) / sizeof(kBackwardConfigs[0]));

// Shared memory of a backward CTA in bytes: two exchange buffers for dB and dC, one staging area
// for dA, and the adjoint state of every (channel, state).
inline constexpr int kBackwardStage = 8;
constexpr std::int64_t backward_shared_memory(int warps, std::int64_t d_state) {
  constexpr std::int64_t kExchange = 2 * 32 * 16;
  constexpr std::int64_t kStage = kBackwardStage * 33;
  return static_cast<std::int64_t>(sizeof(float)) * warps * (kExchange + kStage + d_state);
}

// "serial: 128 threads, 4 lanes per channel, tiles of 64 steps".
std::string describe(const ForwardConfig& config);
std::string describe(const BackwardConfig& config);

// Index of the row to run. `forced` < 0 leaves the choice to the rules; otherwise it is returned if
// that row can run the problem, and Error says why if it cannot.
int choose_forward(const Problem& problem, const mamba_native::cuda::DeviceInfo& device,
                   int forced = -1);
int choose_backward(const Problem& problem, const mamba_native::cuda::DeviceInfo& device,
                    int forced = -1);

namespace cuda {

// T is float, Half or BFloat16: the dtype of params.in.u. Parameters are validated and no size is
// zero.
template <class T>
void forward(const ForwardParams& params);
template <class T>
void backward(const BackwardParams& params);

}  // namespace cuda
}  // namespace mamba_native::selective_scan
