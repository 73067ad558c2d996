// Which kernel runs a scan on a CUDA device: the tables of kernels that exist and the rules that
// pick a row. Plain C++, tested without a GPU.
#pragma once

#include <cstdint>
#include <string>

#include "core/cuda/device.h"
#include "core/math.h"
#include "selective_scan/selective_scan.h"

namespace mamba_native::selective_scan {

// What the choice depends on. All sizes are positive.
struct Problem {
  std::int64_t batch = 1;
  std::int64_t channels = 1;
  std::int64_t length = 1;
  std::int64_t d_state = 1;  // floats of a channel's state: complex ones count twice
  std::int64_t groups = 1;
  bool varying_B = true;  // (B, G, N, L)
  bool varying_C = true;
  bool packed = false;  // several sequences in a batch entry
  bool reverse = false;
  bool deterministic = false;  // backward only
  std::int64_t channels_per_group() const { return channels / groups; }
  std::int64_t tiles() const { return ceil_div(length, kCheckpointInterval); }
};

Problem problem_of(const Inputs& in);
Problem problem_of(const BackwardParams& params);

// What a kernel is for. Whatever it knows beside the plain scan costs instructions and above all
// registers, which the other rows are spared.
enum class Scope {
  plain,
  reverse,  // only
  either,   // plain, reverse, deterministic sums
  packed,   // anything: several sequences in a batch entry too
};

// The two ways to spread a scan over threads; the room's README derives them.
enum class Mapping { serial, lanes };

struct ForwardConfig {
  Mapping mapping;
  Scope scope;
  int threads;  // of a CTA
  int lanes;    // threads that share one channel
  int tile;     // steps that a CTA holds at once
  int states;   // states that a thread advances together: all of its own, or of those in turn
  int blocks;   // CTAs that the register budget keeps on one multiprocessor
};

// One row = one kernel per dtype.
inline constexpr ForwardConfig kForwardConfigs[] = {
    {Mapping::serial, Scope::plain, 128, 2, 32, 8, 3},  // from about 20,000 channels over the batch
    {Mapping::serial, Scope::plain, 128, 4, 32, 4, 4},  // from about 10,000
    {Mapping::serial, Scope::plain, 128, 8, 64, 2, 3},  // from about 2,000
    {Mapping::lanes, Scope::plain, 128, 32, 256, 1, 4},  // fewer, d_state < 8 or > 16, static B, C
    {Mapping::serial, Scope::reverse, 128, 4, 32, 4, 4},
    {Mapping::lanes, Scope::reverse, 128, 32, 256, 1, 4},
    {Mapping::serial, Scope::packed, 128, 4, 32, 4, 3},
    {Mapping::lanes, Scope::packed, 128, 32, 256, 1, 3},
};
inline constexpr int kForwardConfigCount =
    static_cast<int>(sizeof(kForwardConfigs) / sizeof(kForwardConfigs[0]));

// The serial mapping keeps this many states of a channel in registers; a smaller d_state is padded.
inline constexpr std::int64_t kSerialStates = 16;

struct BackwardConfig {
  Scope scope;
  int warps;   // of a CTA: each has one channel of the CTA's group
  int blocks;  // CTAs that the register budget keeps on one multiprocessor
};

inline constexpr BackwardConfig kBackwardConfigs[] = {
    {Scope::plain, 8, 2},   // groups of more than 1 channel: one global atomic per 8 channels
    {Scope::plain, 1, 12},  // groups of one channel, and d_state in the thousands
    {Scope::either, 8, 2},
    {Scope::packed, 4, 3},
};
inline constexpr int kBackwardConfigCount =
    static_cast<int>(sizeof(kBackwardConfigs) / sizeof(kBackwardConfigs[0]));

// Complex A has a kernel of its own per direction, for every dtype, with this many channels per
// CTA.
inline constexpr int kComplexWarps = 4;
inline constexpr BackwardConfig kComplexBackward = {Scope::packed, kComplexWarps, 2};

// Shared memory of a backward CTA in bytes: two exchange buffers for dB and dC, one staging area
// for dA, and the adjoint state of every (channel, state).
inline constexpr int kBackwardStage = 8;
constexpr std::int64_t backward_shared_memory(int warps, std::int64_t d_state) {
  constexpr std::int64_t kExchange = 2 * 32 * 16;
  constexpr std::int64_t kStage = kBackwardStage * 33;
  return static_cast<std::int64_t>(sizeof(float)) * warps * (kExchange + kStage + d_state);
}

// What a deterministic backward call keeps in its workspace, in floats.
struct OrderedWorkspace {
  std::int64_t channel_sums = 0;  // (B, D): dD, and ddelta_bias
  std::int64_t state_sums = 0;  // (B, D, N): dA, dB, dC where static, and the adjoint between tiles
  std::int64_t tile = 0;        // the CTAs' parts of a time-varying dB, and dC, over one tile
  std::int64_t blocks = 0;      // CTAs of a group
  bool varying_B = false, varying_C = false;

  std::int64_t fixed() const;
  std::int64_t tiles(std::int64_t floats) const;  // that a workspace of this size holds
};
OrderedWorkspace ordered_workspace(const Problem& problem, const BackwardConfig& config);

// The parts of as many tiles as fit about this many floats (256 MB), and one at least.
inline constexpr std::int64_t kPartFloats = std::int64_t{1} << 26;
std::int64_t wanted_floats(const OrderedWorkspace& workspace, std::int64_t tiles);

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
