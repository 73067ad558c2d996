// The scan on the CPU: how the work is cut, and what a kernel of one instruction set offers. Not
// public; parameters are validated and not float64.
#pragma once

#include <cstdint>

#include "core/compiler.h"
#include "core/cpu/isa.h"
#include "ssd/ssd.h"

namespace mamba_native::ssd::cpu {

using mamba_native::cpu::Isa;

// Parallel over slices: see Slice. Kernels get views in the order of the scan: `reverse` is a
// negative stride to them. Results depend on the instruction set, never on the threads.
void forward(const ForwardParams& params, Isa isa = mamba_native::cpu::current_isa());
void backward(const BackwardParams& params, Isa isa = mamba_native::cpu::current_isa());

// Steps that become matrix products at once. A chunk ends where this length, a block of
// kCheckpointInterval or a sequence ends.
inline constexpr std::int64_t kChunk = 64;
static_assert(kCheckpointInterval % kChunk == 0, "a checkpoint is the state between two chunks");

// Some heads of one group of one batch entry: what one thread does at a time. They share C B^T.
struct Slice {
  std::int64_t batch;
  std::int64_t group;
  std::int64_t first;
  std::int64_t count;
};

// What a slice's backward leaves, and keeps from one stretch of time to the one before it. Zeroed
// before the last stretch.
struct Sums {
  float* carry;      // (count, P, padded N): adjoint of the state that leaves the stretch
  double* dA;        // (count)
  double* ddt_bias;  // (count)
  double* dD;        // (count, P)
};

// A stretch of time for backward, whole blocks of kCheckpointInterval steps but for the last, and
// where the slice leaves its part of dB and dC there: (end - begin, padded N), overwritten.
struct Stretch {
  std::int64_t begin;
  std::int64_t end;
  float* dB;
  float* dC;
};

// d_state with its rows padded to whole vectors of every instruction set.
MAMBA_ALWAYS_INLINE std::int64_t padded(std::int64_t states) { return (states + 15) / 16 * 16; }

struct Kernels {
  // Floats of scratch that a call needs, aligned to 64 bytes.
  std::int64_t (*forward_scratch)(const Inputs& in, std::int64_t heads);
  void (*forward)(const ForwardParams& params, const Slice& slice, float* scratch);
  std::int64_t (*backward_scratch)(const Inputs& in);
  void (*backward)(const BackwardParams& params, const Slice& slice, const Stretch& stretch,
                   const Sums& sums, float* scratch);
};

extern const Kernels kSse2Kernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

}  // namespace mamba_native::ssd::cpu
