// The state update in SIMD: N lies across the lanes, one row p after the other.
//
//   s' = s exp(delta A) + (delta x) B,   out = (sum_n s' C + D x) silu?(z)
//
// delta and silu come first and last for all rows of the block, rows across the lanes.
#pragma once

#include "core/cpu/simd.h"
#include "state_update/cpu.h"

namespace mamba_native::state_update::cpu {

using mamba_native::cpu::kLanes;
using mamba_native::cpu::Vec;

// Up to kLanes values of a row that may be strided or end early; the rest is 0.
template <class Arch, class T>
MAMBA_ALWAYS_INLINE Vec<Arch> load_part(const T* from, std::int64_t stride, std::int64_t valid) {
  if (stride == 1 && valid >= kLanes<Arch>) {
    return mamba_native::cpu::load<Arch>(from);
  }
  float lanes[kLanes<Arch>] = {};
  for (std::int64_t i = 0; i < kLanes<Arch> && i < valid; ++i) {
    lanes[i] = to_float(from[i * stride]);
  }
  return Vec<Arch>::load_unaligned(lanes);
}

template <class Arch, class T>
MAMBA_ALWAYS_INLINE void store_part(T* to, std::int64_t stride, std::int64_t valid,
                                    Vec<Arch> value) {
  if (stride == 1 && valid >= kLanes<Arch>) {
    mamba_native::cpu::store<Arch>(to, value);
    return;
  }
  T lanes[kLanes<Arch>];
  mamba_native::cpu::store<Arch>(lanes, value);
  for (std::int64_t i = 0; i < kLanes<Arch> && i < valid; ++i) {
    to[i * stride] = lanes[i];
  }
}

template <class Arch, class T>
void update_typed_rows(const Rows& rows) {
  using V = Vec<Arch>;
  constexpr std::int64_t kStep = kLanes<Arch>;
  const V low(rows.dt_min), high(rows.dt_max);
  for (std::int64_t i = 0; i < rows.count; i += kStep) {
    const V raw = V::load_unaligned(rows.delta + i);
    const V free = rows.dt_softplus ? mamba_native::cpu::softplus<Arch>(raw) : raw;
    xsimd::select(free < low, low, xsimd::select(free > high, high, free))
        .store_unaligned(rows.delta + i);
  }
  if (rows.log_A != nullptr) {
    const std::int64_t values = rows.tied ? kStep : rows.count * rows.A_row_stride;
    for (std::int64_t i = 0; i < values; i += kStep) {
      (-xsimd::exp(V::load_unaligned(rows.log_A + i))).store_unaligned(rows.log_A + i);
    }
  }
  for (std::int64_t p = 0; p < rows.count; ++p) {
    T* const state = static_cast<T*>(rows.state) + p * rows.row_stride;
    const V delta(rows.delta[p]);
    const V drive(rows.delta[p] * rows.x[p]);
    const float* const A = rows.A + p * rows.A_row_stride;
    const V tied_decay = xsimd::exp(delta * V(A[0]));
    V sum(0.0f);
    for (std::int64_t n = 0; n < rows.d_state; n += kStep) {
      const V decay = rows.tied ? tied_decay : xsimd::exp(delta * V::load_unaligned(A + n));
      const V old = load_part<Arch>(state + n * rows.stride, rows.stride, rows.d_state - n);
      const V updated = xsimd::fma(old, decay, drive * V::load_unaligned(rows.B + n));
      sum = xsimd::fma(updated, V::load_unaligned(rows.C + n), sum);
      store_part<Arch>(state + n * rows.stride, rows.stride, rows.d_state - n, updated);
    }
    rows.out[p] = xsimd::reduce_add(sum);
  }
  for (std::int64_t i = 0; i < rows.count; i += kStep) {
    V out = V::load_unaligned(rows.out + i);
    if (rows.D != nullptr) {
      out = xsimd::fma(V::load_unaligned(rows.D + i), V::load_unaligned(rows.x + i), out);
    }
    if (rows.z != nullptr) {
      out *= mamba_native::cpu::silu<Arch>(V::load_unaligned(rows.z + i));
    }
    out.store_unaligned(rows.out + i);
  }
}

template <class Arch>
void update_rows(const Rows& rows) {
  static_assert(kPad % kLanes<Arch> == 0 && kBlock % kLanes<Arch> == 0, "whole vectors only");
  for_dtype(rows.dtype, [&](auto tag) { update_typed_rows<Arch, decltype(tag)>(rows); });
}

}  // namespace mamba_native::state_update::cpu
