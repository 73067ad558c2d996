// What the norms' SIMD kernels share: rows of any stored type as floats, and sums over them.
#pragma once

#include <cstdint>

#include "core/cpu/simd.h"

namespace mamba_native::cpu {

// `count` elements, `step` apart.
template <class Arch, class T>
void read_typed(const T* from, std::int64_t step, std::int64_t count, float* to) {
  std::int64_t n = 0;
  for (; step == 1 && n + kLanes<Arch> <= count; n += kLanes<Arch>) {
    load<Arch>(from + n).store_unaligned(to + n);
  }
  for (; n < count; ++n) {
    to[n] = to_float(from[n * step]);
  }
}

template <class Arch, class T>
void write_typed(const float* from, std::int64_t step, std::int64_t count, T* to) {
  std::int64_t n = 0;
  for (; step == 1 && n + kLanes<Arch> <= count; n += kLanes<Arch>) {
    store<Arch>(to + n, Vec<Arch>::load_unaligned(from + n));
  }
  for (; n < count; ++n) {
    T lanes[kLanes<Arch>];
    store<Arch>(lanes, Vec<Arch>(from[n]));
    to[n * step] = lanes[0];
  }
}

// Four independent chains hide the latency of the additions.
template <class Arch>
struct Sum {
  Vec<Arch> chains[4] = {Vec<Arch>(0.0f), Vec<Arch>(0.0f), Vec<Arch>(0.0f), Vec<Arch>(0.0f)};

  MAMBA_ALWAYS_INLINE Vec<Arch>& operator[](std::int64_t n) { return chains[n / kLanes<Arch> % 4]; }
  MAMBA_ALWAYS_INLINE float total() const {
    return xsimd::reduce_add((chains[0] + chains[1]) + (chains[2] + chains[3]));
  }
};

}  // namespace mamba_native::cpu
