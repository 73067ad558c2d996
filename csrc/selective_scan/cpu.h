// The scan on the CPU: how the work is cut, and what a kernel of one instruction set offers. Not
// public; parameters are validated and not float64.
#pragma once

#include <cstdint>

#include "core/compiler.h"
#include "core/cpu/isa.h"
#include "selective_scan/selective_scan.h"

namespace mamba_native::selective_scan::cpu {

using mamba_native::cpu::Isa;

// The kernels see a channel's states as rows of floats: N, or 2 N for complex ones, whose real and
// imaginary parts are neighbours. `offset` is a row's place in a tensor. Always inlined, because
// the kernels of several instruction sets include it.
struct StateRows {
  std::int64_t state = 1;
  std::int64_t part = 0;
  std::int64_t parts = 1;

  MAMBA_ALWAYS_INLINE std::int64_t offset(std::int64_t row) const {
    return row / parts * state + row % parts * part;
  }
};

// Of a tensor with the states in dimension `dim`.
MAMBA_ALWAYS_INLINE StateRows rows_of(const Inputs& in, const TensorView& view, int dim) {
  const bool is_complex = in.A.dim == 3;
  return is_complex ? StateRows{view.stride[dim], view.stride[view.dim - 1], 2}
                    : StateRows{view.stride[dim], 0, 1};
}

MAMBA_ALWAYS_INLINE std::int64_t count_rows(const Inputs& in) {
  return in.A.dim == 3 ? 2 * in.A.size[1] : in.A.size[1];
}

// Parallel over slices: see Slice. Kernels get views in the order of the scan: `reverse` is a
// negative stride to them. Results depend on the instruction set, never on the threads.
void forward(const ForwardParams& params, Isa isa = mamba_native::cpu::current_isa());
void backward(const BackwardParams& params, Isa isa = mamba_native::cpu::current_isa());

// One batch entry and some channels of one group: what one thread does at a time. `first` is a
// channel of u; the slice's channels are processed `lanes` at once, in blocks.
struct Slice {
  std::int64_t batch;
  std::int64_t group;
  std::int64_t first;
  std::int64_t count;
};

// What a slice's backward keeps from one segment of time to the one before it, per block of
// channels: these quantities as [state][lane], then kLaneSums sums as [lane].
enum Quantity {
  kCarry,
  kSumA,
  kSumB,
  kSumC,
  kQuantities
};  // adjoint state; dA, and static dB and dC
enum LaneSum { kSumD, kSumBias, kLaneSums };

// A stretch of time for backward, in tiles of kCheckpointInterval steps, and where the slice leaves
// its part of a time-varying dB and dC: [state][(last_tile - first_tile) * kCheckpointInterval],
// zeroed.
struct Segment {
  std::int64_t first_tile;
  std::int64_t last_tile;
  float* dB;
  float* dC;
};

struct Kernels {
  int lanes;  // channels that one vector holds
  // Floats of scratch that a call needs, aligned to 64 bytes.
  std::int64_t (*forward_scratch)(std::int64_t states, std::int64_t channels);
  void (*forward)(const ForwardParams& params, const Slice& slice, float* scratch);
  std::int64_t (*backward_scratch)(std::int64_t states, std::int64_t channels);
  void (*backward)(const BackwardParams& params, const Slice& slice, const Segment& segment,
                   float* quantities, float* scratch);
};

extern const Kernels kSse2Kernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

namespace plain {

// Portable scalar C++ without SIMD: what MAMBA_CPU_ISA=plain runs and benchmarks compare with.
void forward(const ForwardParams& params);
void backward(const BackwardParams& params);

}  // namespace plain
}  // namespace mamba_native::selective_scan::cpu
