// How CUDA picks a kernel, and the entries of its dtypes. Not public; parameters are validated.
#pragma once

#include <cstdint>
#include <string>

#include "causal_conv1d/causal_conv1d.h"
#include "core/cuda/device.h"

namespace mamba_native::causal_conv1d {

// True when neighbours in memory are neighbours in channel rather than in time.
bool is_channel_last(const TensorView& x);

namespace cuda {

// What a thread's vectors lie along.
enum class Axis { time, channels };

// Mamba's width. It has kernels of its own, and so have the widths below it along time.
inline constexpr int kWidestOwnKernel = 4;

// One row = one kernel per direction, width and dtype: a thread moves that many consecutive
// elements of 2 or of 4 bytes at once.
struct Config {
  Axis axis;
  int items_of_2_bytes;
  int items_of_4_bytes;
  bool any_width = false;  // one kernel for every width, known at run time

  constexpr int items(std::int64_t element_bytes) const {
    return element_bytes == 2 ? items_of_2_bytes : items_of_4_bytes;
  }
};

inline constexpr Config kForwardConfigs[] = {
    {Axis::time, 16, 8},
    {Axis::channels, 4, 4},
    {Axis::channels, 4, 2},        // float32 whose rows are aligned to no more than 8 bytes
    {Axis::channels, 2, 1, true},  // widths 2 and 3 along channels, and all above 4
};
inline constexpr int kForwardConfigCount =
    static_cast<int>(sizeof(kForwardConfigs) / sizeof(kForwardConfigs[0]));

inline constexpr Config kBackwardConfigs[] = {
    {Axis::time, 16, 8},
    {Axis::channels, 4, 4},
    {Axis::channels, 2, 1, true},
};
inline constexpr int kBackwardConfigCount =
    static_cast<int>(sizeof(kBackwardConfigs) / sizeof(kBackwardConfigs[0]));

inline constexpr int kMaxThreads = 128;
inline constexpr std::int64_t kMaxGridY = 65535;

// A kernel and its launch. A thread block is lanes x groups threads: lanes lie along the axis,
// groups along the other one.
struct Plan {
  int config = 0;             // row of the table
  int lanes = 1;              // blockDim.x
  int groups = 1;             // blockDim.y
  std::int64_t steps = 1;     // time axis: vectors per thread; channel axis: time steps per thread
  std::int64_t segments = 1;  // thread blocks along time
  std::int64_t blocks = 1;    // gridDim.x: segments times thread blocks along the channels
  std::int64_t batches = 1;   // gridDim.y; a thread block takes every batches-th sequence
};

// "vectors along time: 8 of 16 bits, 4 of 32".
std::string describe(const Config& config);

// `forced` < 0 leaves the row to the rules. Error when the grid would exceed CUDA's limits.
// `ordered`: thread blocks leave their sums in a workspace, segments times batches rows, which is
// kept smaller than the tensors.
Plan choose_forward(const Inputs& in, const mamba_native::cuda::DeviceInfo& device,
                    int forced = -1);
Plan choose_backward(const Inputs& in, const mamba_native::cuda::DeviceInfo& device, bool ordered,
                     int forced = -1);

// True when strides and address let a tensor (B, D, L) or (B, D, W-1) move in the vectors of
// `config`.
bool moves_vectors(const TensorView& tensor, const Config& config);

// T is the host's type of x's elements: float, Half or BFloat16.
template <class T>
void forward(const ForwardParams& params, const Plan& plan);
template <class T>
void backward(const BackwardParams& params, const Plan& plan);
template <class T>
void update(const UpdateParams& params);
void varlen_states(const VarlenStatesParams& params);

}  // namespace cuda
}  // namespace mamba_native::causal_conv1d
