// The convolution on the CPU: how the work is cut, and what the kernels of an instruction set are
// given. Not public; parameters are validated and not float64.
#pragma once

#include <cstdint>

#include "causal_conv1d/causal_conv1d.h"
#include "core/cpu/isa.h"

namespace mamba_native::causal_conv1d::cpu {

using mamba_native::cpu::Isa;

// Results depend on the instruction set, never on the threads.
void forward(const ForwardParams& params, Isa isa = mamba_native::cpu::current_isa());
void backward(const BackwardParams& params, Isa isa = mamba_native::cpu::current_isa());
void update(const UpdateParams& params, Isa isa = mamba_native::cpu::current_isa());

// What is in work at once: steps of a row, or channels of a step. Fewer channels backward, where
// every channel brings its sums and the W columns of dx that are not finished.
inline constexpr int kTimeBlock = 512;
inline constexpr int kForwardChannels = 256;
inline constexpr int kBackwardChannels = 128;

// Whether a column of [initial_states, x] counts in final_states: without seq_idx each does.
bool is_of_last_sequence(const Inputs& in, std::int64_t b, std::int64_t column);

// The kernels of one width and one instruction set.
struct KernelsOfWidth {
  // out of the row (b, d), vectors along time.
  void (*forward_row)(const ForwardParams& params, std::int64_t b, std::int64_t d);
  // out of the steps [begin, end) of block `index` of kForwardChannels channels of sequence b,
  // vectors along channels.
  void (*forward_block)(const ForwardParams& params, std::int64_t b, std::int64_t index,
                        std::int64_t begin, std::int64_t end);
  // Every gradient of channel d, vectors along time. Not for length 0.
  void (*backward_row)(const BackwardParams& params, std::int64_t d);
  // Every gradient of block `index` of kBackwardChannels channels, vectors along channels.
  void (*backward_block)(const BackwardParams& params, std::int64_t index);
};

struct Kernels {
  KernelsOfWidth for_width[3];  // widths 2, 3, 4
  KernelsOfWidth for_any_width;
};

extern const Kernels kSse2Kernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

}  // namespace mamba_native::causal_conv1d::cpu
