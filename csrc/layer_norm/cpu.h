// The norm on the CPU: how the work is cut, and what the kernels of an instruction set are given.
// Not public; parameters are validated and not float64.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "layer_norm/branches.h"
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
// h, one more, weight, bias; with branches weight1, bias1, dropout's factors.
inline std::int64_t arrays_of(const ForwardParams& p) { return has_branches(p) ? 7 : 4; }
// xhat, g, dh, weight, dweight, dbias; with branches the last three again, one more, factors.
inline std::int64_t arrays_of(const BackwardParams& p) { return has_branches(p) ? 11 : 6; }

inline std::int64_t padded(std::int64_t features) { return (features + kPad - 1) / kPad * kPad; }

struct Kernels {
  // scratch: arrays_of(params) * padded(N) zeros.
  void (*forward)(const ForwardParams& params, std::int64_t begin, std::int64_t end,
                  float* scratch);
  // scratch: arrays_of(params) * padded(N) zeros. Writes this block's row of the workspace.
  void (*backward)(const BackwardParams& params, std::int64_t begin, std::int64_t end,
                   float* scratch, float* workspace);
};

extern const Kernels kSse2Kernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

}  // namespace mamba_native::layer_norm::cpu
