// The norm on the CPU: how the work is cut, and what the kernels of an instruction set are given.
// Not public; parameters are validated and not float64.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "layer_norm/layer_norm.h"

namespace mamba_native::layer_norm::cpu {

using mamba_native::cpu::Isa;

// Parallel over rows. Results depend on the instruction set, never on the threads.
void forward(const ForwardParams& params, Isa isa = mamba_native::cpu::current_isa());
void backward(const BackwardParams& params, Isa isa = mamba_native::cpu::current_isa());

// Blocks of rows of backward, each with a workspace row of its own: enough for any number of
// threads and few beside the rows.
std::int64_t blocks(std::int64_t rows);

// A kernel works on rows [begin, end) in float32, in arrays padded with zeros to whole vectors of
// any instruction set.
inline constexpr std::int64_t kPad = 16;
inline constexpr std::int64_t kForwardArrays = 4;  // h, weight, bias, residual and y
inline constexpr std::int64_t kBackwardArrays =
    6;  // xhat, w dy, dresidual_out, weight, dweight, dbias

inline std::int64_t padded(std::int64_t features) { return (features + kPad - 1) / kPad * kPad; }

struct Kernels {
  // scratch: kForwardArrays * padded(N) zeros.
  void (*forward)(const ForwardParams& params, std::int64_t begin, std::int64_t end,
                  float* scratch);
  // scratch: kBackwardArrays * padded(N) zeros. Writes this block's row of the workspace.
  void (*backward)(const BackwardParams& params, std::int64_t begin, std::int64_t end,
                   float* scratch, float* workspace);
};

extern const Kernels kSse2Kernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

}  // namespace mamba_native::layer_norm::cpu
