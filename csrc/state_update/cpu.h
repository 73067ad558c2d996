// The step on the CPU: how the work is cut, and what the kernel of an instruction set is given. Not
// public; parameters are validated and not float64.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "state_update/state_update.h"

namespace mamba_native::state_update::cpu {

using mamba_native::cpu::Isa;

// Parallel over blocks of rows. Results depend on the instruction set, never on the threads.
void update(const Params& params, Isa isa = mamba_native::cpu::current_isa());

inline constexpr std::int64_t kBlock = 64;  // rows that a kernel takes at most
inline constexpr std::int64_t kPad = 16;    // floats of the widest vector

// Consecutive rows p of one (batch, head), with everything but the state already float32 and the
// arrays over N padded with zeros to a multiple of kPad.
struct Rows {
  void* state;  // row 0
  DType dtype;
  std::int64_t row_stride;  // of state, in elements
  std::int64_t stride;
  std::int64_t d_state;
  const float* B;  // (padded N)
  const float* C;  // (padded N)
  const float* A;  // one value when `tied`, otherwise rows of padded N
  std::int64_t A_row_stride;
  bool tied;
  float* log_A;  // if not null, the same as A, and the kernel has to make it -exp of what it is
  bool dt_softplus;
  float dt_min, dt_max;
  const float* x;  // (kBlock), as the rest: only the first `count` matter
  float* delta;    // dt + dt_bias on entry
  const float* D;  // null when absent
  const float* z;  // null when absent
  float* out;
  std::int64_t count;  // rows, at most kBlock
};

void update_rows_sse2(const Rows& rows);
void update_rows_avx2(const Rows& rows);
void update_rows_avx512(const Rows& rows);

}  // namespace mamba_native::state_update::cpu
