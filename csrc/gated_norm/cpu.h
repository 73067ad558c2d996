// The gated norm on the CPU: how the work is cut, and what the kernels of an instruction set are
// given. Not public; parameters are validated and not float64.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "gated_norm/gated_norm.h"

namespace mamba_native::gated_norm::cpu {

using mamba_native::cpu::Isa;

// Parallel over rows. Results depend on the instruction set, never on the threads.
void forward(const ForwardParams& params, Isa isa = mamba_native::cpu::current_isa());
void backward(const BackwardParams& params, Isa isa = mamba_native::cpu::current_isa());

// Blocks of rows of backward, each with a workspace row of its own: enough for any number of
// threads and few beside the rows.
std::int64_t blocks(std::int64_t rows);

// A kernel works on rows [begin, end) in float32, group by group, in arrays padded with zeros to
// whole vectors of any instruction set.
inline constexpr std::int64_t kPad = 16;
inline std::int64_t padded(std::int64_t group_size) {
  return (group_size + kPad - 1) / kPad * kPad;
}

// Floats of scratch: so many arrays of a group, and of all groups.
inline std::int64_t scratch_of(const ForwardParams& p) {  // u, z, y; weight, bias
  return (3 + 2 * (p.x.size[1] / p.group_size)) * padded(p.group_size);
}
inline std::int64_t scratch_of(const BackwardParams& p) {  // x, z, dy, xhat, g, y, dz; weight,
  return (7 + 4 * (p.x.size[1] / p.group_size)) * padded(p.group_size);  // bias, dweight, dbias
}

struct Kernels {
  // scratch: scratch_of(params) zeros.
  void (*forward)(const ForwardParams& params, std::int64_t begin, std::int64_t end,
                  float* scratch);
  // scratch: scratch_of(params) zeros. Writes this block's row of the workspace.
  void (*backward)(const BackwardParams& params, std::int64_t begin, std::int64_t end,
                   float* scratch, float* workspace);
};

extern const Kernels kSse2Kernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

}  // namespace mamba_native::gated_norm::cpu
