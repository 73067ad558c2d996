// Element types of tensors, and the host's own 16-bit floats.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/compiler.h"

namespace mamba_native {

enum class DType : std::int8_t { f32, f16, bf16, f64, i32, i64 };

// "float32", "float16", ...: the names that PyTorch users know.
const char* name(DType dtype);

// Size of one element in bytes.
std::int64_t size_of(DType dtype);

// True for f32, f16, bf16 and f64.
bool is_floating(DType dtype);

// IEEE binary16 as stored in memory. Arithmetic happens in float; conversions round to nearest
// even.
struct Half {
  std::uint16_t bits = 0;
};

// The upper half of an IEEE binary32.
struct BFloat16 {
  std::uint16_t bits = 0;
};

// Always inlined: the CPU kernels' translation units are compiled for different instruction sets,
// and the linker must not share one's copy with another.
MAMBA_ALWAYS_INLINE std::uint32_t float_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

MAMBA_ALWAYS_INLINE float bits_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

MAMBA_ALWAYS_INLINE float to_float(float value) { return value; }
MAMBA_ALWAYS_INLINE double to_float(double value) { return value; }
MAMBA_ALWAYS_INLINE float to_float(BFloat16 value) {
  return bits_float(static_cast<std::uint32_t>(value.bits) << 16);
}
MAMBA_ALWAYS_INLINE float to_float(Half value) {
  // Shift the 15 magnitude bits under binary32's exponent field, then rescale by 2^112, which also
  // normalises subnormals; infinities and NaNs keep their meaning by saturating the exponent.
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = static_cast<std::uint32_t>(value.bits & 0x7fffu) << 13;
  const float scaled = bits_float(magnitude) * bits_float(0x77800000u);
  const std::uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return bits_float(sign | float_bits(scaled) | special);
}

template <class T>
T from_float(double value);
template <>
inline double from_float<double>(double value) {
  return value;
}
template <>
inline float from_float<float>(double value) {
  return static_cast<float>(value);
}

MAMBA_ALWAYS_INLINE BFloat16 round_to_bf16(float value) {
  const std::uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return BFloat16{static_cast<std::uint16_t>((bits >> 16) | 0x40u)};
  }
  return BFloat16{static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

MAMBA_ALWAYS_INLINE Half round_to_f16(float value) {
  const std::uint32_t bits = float_bits(value);
  const std::uint16_t sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t rounded;
  if (magnitude > 0x7f800000u) {
    rounded = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {
    rounded = 0x7c00u;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 leaves the subnormal's bits, rounded to nearest even, at the bottom.
    rounded = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    rounded = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return Half{static_cast<std::uint16_t>(sign | rounded)};
}

template <>
inline BFloat16 from_float<BFloat16>(double value) {
  return round_to_bf16(static_cast<float>(value));
}
template <>
inline Half from_float<Half>(double value) {
  return round_to_f16(static_cast<float>(value));
}

}  // namespace mamba_native
