// Device arithmetic. The scans' inner loops live on ex2.approx (2 ulp); what happens once per
// element is accurate to about 2 ulp too, without any division or branch that costs. Flags such as
// --use_fast_math are never needed and never used.
#pragma once

#include "core/math.h"

namespace mamba_native::cuda {

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float fast_sigmoid(float x) {
  return reciprocal_approx(1.0f + expf(-x));
}

__device__ __forceinline__ float fast_silu(float x) { return x * fast_sigmoid(x); }

// d silu(x) / dx
__device__ __forceinline__ float fast_silu_grad(float x) {
  const float s = fast_sigmoid(x);
  return s * fmaf(x, 1.0f - s, 1.0f);
}

// log1pf and not lg2.approx: the latter loses the last bits of a small step, and every decay with
// them.
__device__ __forceinline__ float fast_softplus(float x) {
  return x > kSoftplusThreshold ? x : log1pf(expf(x));
}

// The same value, but the compiler cannot know: what depends on it is computed again where it is
// used, instead of holding registers over a whole loop.
__device__ __forceinline__ int recomputed(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

}  // namespace mamba_native::cuda
