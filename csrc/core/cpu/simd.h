// What the SIMD kernels share: conversions between stored types and float vectors, and the few
// elementary functions of the Mamba family. Include only in translation units of one instruction
// set: everything is templated on xsimd's Arch, so that no two of them define the same symbol.
#pragma once

#include <cstdint>
#include <cstring>
#include <xsimd/xsimd.hpp>

#include "core/compiler.h"
#include "core/dtype.h"

namespace mamba_native::cpu {

template <class Arch>
using Vec = xsimd::batch<float, Arch>;

template <class Arch>
using Int = xsimd::batch<std::int32_t, Arch>;

template <class Arch>
inline constexpr int kLanes = static_cast<int>(Vec<Arch>::size);

// 2^x for x < 128: the decay of every scan. Below -126 it gives 2^-126, from 128 on, where 2^x is
// no float, anything; NaN stays NaN. Relative error below 1e-7: 2^r is a minimax polynomial of
// degree 6 on
// [-0.5, 0.5], itself good to 2e-9, because a decay near 1 is raised to the power of the sequence
// and a bias would grow with it; then the exponent by integer addition.
template <class Arch>
MAMBA_ALWAYS_INLINE Vec<Arch> exp2_decay(Vec<Arch> x) {
  using V = Vec<Arch>;
  x = xsimd::max(V(-126.0f), x);
  const Int<Arch> whole = xsimd::nearbyint_as_int(x);
  const V r = x - xsimd::batch_cast<float>(whole);
  V p = xsimd::fma(V(1.5353362e-4f), r, V(1.33988744e-3f));
  p = xsimd::fma(p, r, V(9.61843736e-3f));
  p = xsimd::fma(p, r, V(5.55033247e-2f));
  p = xsimd::fma(p, r, V(2.40226479e-1f));
  p = xsimd::fma(p, r, V(6.93147203e-1f));
  p = xsimd::fma(p, r, V(1.0f));
  return xsimd::bitwise_cast<float>(xsimd::bitwise_cast<std::int32_t>(p) + (whole << 23));
}

// 1 / (1 + exp(-x)), accurate to about 2 ulp, saturating without overflow.
template <class Arch>
MAMBA_ALWAYS_INLINE Vec<Arch> sigmoid(Vec<Arch> x) {
  using V = Vec<Arch>;
  return V(1.0f) / (V(1.0f) + xsimd::exp(-x));
}

template <class Arch>
MAMBA_ALWAYS_INLINE Vec<Arch> silu(Vec<Arch> x) {
  return x * sigmoid<Arch>(x);
}

// log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|)), whose second term errs by less than the sum is
// rounded by. From 20 on it is x itself, as everywhere; NaN stays NaN.
template <class Arch>
MAMBA_ALWAYS_INLINE Vec<Arch> softplus(Vec<Arch> x) {
  using V = Vec<Arch>;
  return xsimd::max(x, V(0.0f)) + xsimd::log1p(xsimd::exp(-xsimd::abs(x)));
}

// kLanes consecutive 16-bit patterns, widened to 32 bits, and the low halves of 32 bits stored
// back. Compilers turn both loops into one or two instructions.
template <class Arch>
MAMBA_ALWAYS_INLINE Int<Arch> load_bits(const void* from) {
  std::uint16_t narrow[kLanes<Arch>];
  std::int32_t wide[kLanes<Arch>];
  std::memcpy(narrow, from, sizeof narrow);
  for (int i = 0; i < kLanes<Arch>; ++i) {
    wide[i] = narrow[i];
  }
  return Int<Arch>::load_unaligned(wide);
}
template <class Arch>
MAMBA_ALWAYS_INLINE void store_bits(void* to, Int<Arch> bits) {
  std::uint16_t narrow[kLanes<Arch>];
  std::int32_t wide[kLanes<Arch>];
  bits.store_unaligned(wide);
  for (int i = 0; i < kLanes<Arch>; ++i) {
    narrow[i] = static_cast<std::uint16_t>(wide[i]);
  }
  std::memcpy(to, narrow, sizeof narrow);
}

// kLanes consecutive stored values as floats, at any alignment.
template <class Arch>
MAMBA_ALWAYS_INLINE Vec<Arch> load(const float* from) {
  return Vec<Arch>::load_unaligned(from);
}
template <class Arch>
MAMBA_ALWAYS_INLINE Vec<Arch> load(const BFloat16* from) {
  return xsimd::bitwise_cast<float>(load_bits<Arch>(from) << 16);
}
// As dtype.h's to_float(Half).
template <class Arch>
MAMBA_ALWAYS_INLINE Vec<Arch> load(const Half* from) {
  using I = Int<Arch>;
  const I bits = load_bits<Arch>(from);
  const I magnitude = (bits & I(0x7fff)) << 13;
  const Vec<Arch> scaled = xsimd::bitwise_cast<float>(magnitude) * Vec<Arch>(0x1p112f);
  const I special = xsimd::select(magnitude > I(0x0f7fffff), I(0x7f800000), I(0));
  const I sign = (bits & I(0x8000)) << 16;
  return xsimd::bitwise_cast<float>(xsimd::bitwise_cast<std::int32_t>(scaled) | special | sign);
}

// Rounded to nearest even, as dtype.h's round_to_bf16 and round_to_f16.
template <class Arch>
MAMBA_ALWAYS_INLINE void store(float* to, Vec<Arch> value) {
  value.store_unaligned(to);
}
template <class Arch>
MAMBA_ALWAYS_INLINE void store(BFloat16* to, Vec<Arch> value) {
  using I = Int<Arch>;
  const I bits = xsimd::bitwise_cast<std::int32_t>(value);
  const I upper = (bits >> 16) & I(0xffff);
  const I rounded = (bits + I(0x7fff) + (upper & I(1))) >> 16;
  const I result = xsimd::select((bits & I(0x7fffffff)) > I(0x7f800000), upper | I(0x40), rounded);
  store_bits<Arch>(to, result);
}
template <class Arch>
MAMBA_ALWAYS_INLINE void store(Half* to, Vec<Arch> value) {
  using I = Int<Arch>;
  const I bits = xsimd::bitwise_cast<std::int32_t>(value);
  const I magnitude = bits & I(0x7fffffff);
  const I normal = (magnitude - I(0x38000000) + I(0xfff) + ((magnitude >> 13) & I(1))) >> 13;
  const I subnormal =
      xsimd::bitwise_cast<std::int32_t>(xsimd::bitwise_cast<float>(magnitude) + Vec<Arch>(0.5f)) -
      I(0x3f000000);
  I rounded = xsimd::select(magnitude < I(0x38800000), subnormal, normal);
  rounded = xsimd::select(magnitude > I(0x477fefff), I(0x7c00), rounded);
  rounded = xsimd::select(magnitude > I(0x7f800000), I(0x7e00), rounded);
  store_bits<Arch>(to, rounded | ((bits >> 16) & I(0x8000)));
}

}  // namespace mamba_native::cpu
