// Device arithmetic: the three approximate instructions that the scans live on, and the functions
// made of them. Approximate here means 2 ulp, far below the rounding of any 16-bit output; flags
// such as
// --use_fast_math are never needed and never used.
#pragma once

#include "core/math.h"

namespace mamba_native::cuda {

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float fast_sigmoid(float x) {
  return reciprocal_approx(1.0f + exp2_approx(-kLog2E * x));
}

__device__ __forceinline__ float fast_silu(float x) { return x * fast_sigmoid(x); }

// d silu(x) / dx
__device__ __forceinline__ float fast_silu_grad(float x) {
  const float s = fast_sigmoid(x);
  return s * fmaf(x, 1.0f - s, 1.0f);
}

// log(1 + e^x): below e^x = 0.03 a series, because 1 + e^x would lose e^x's last bits.
__device__ __forceinline__ float fast_softplus(float x) {
  const float e = exp2_approx(kLog2E * x);
  const float series = e * fmaf(e, fmaf(e, fmaf(e, -0.25f, 0.33333333f), -0.5f), 1.0f);
  const float logarithm = log2_approx(1.0f + e) * kLn2;
  return x > kSoftplusThreshold ? x : (e < 0.03f ? series : logarithm);
}

}  // namespace mamba_native::cuda
