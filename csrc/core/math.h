// Scalar formulas that host and device share.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/compiler.h"

namespace mamba_native {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.69314718055994531f;

// The exact threshold above which every Mamba kernel takes softplus(x) = x.
inline constexpr float kSoftplusThreshold = 20.0f;

template <class Scalar>
MAMBA_HOST_DEVICE inline Scalar sigmoid(Scalar x) {
  return Scalar(1) / (Scalar(1) + std::exp(-x));
}

template <class Scalar>
MAMBA_HOST_DEVICE inline Scalar silu(Scalar x) {
  return x * sigmoid(x);
}

// d silu(x) / dx
template <class Scalar>
MAMBA_HOST_DEVICE inline Scalar silu_grad(Scalar x) {
  const Scalar s = sigmoid(x);
  return s * (Scalar(1) + x * (Scalar(1) - s));
}

template <class Scalar>
MAMBA_HOST_DEVICE inline Scalar softplus(Scalar x) {
  return x > Scalar(kSoftplusThreshold) ? x : std::log1p(std::exp(x));
}

// d softplus(x) / dx: the sigmoid below the threshold, 1 above.
template <class Scalar>
MAMBA_HOST_DEVICE inline Scalar softplus_grad(Scalar x) {
  return x > Scalar(kSoftplusThreshold) ? Scalar(1) : sigmoid(x);
}

MAMBA_HOST_DEVICE inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace mamba_native
