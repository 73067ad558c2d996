// Device element types and vector access.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/dtype.h"

namespace mamba_native::cuda {

// The device's twin of a host element type.
template <class T>
struct DeviceTypeOf;
template <>
struct DeviceTypeOf<float> {
  using type = float;
};
template <>
struct DeviceTypeOf<Half> {
  using type = __half;
};
template <>
struct DeviceTypeOf<BFloat16> {
  using type = __nv_bfloat16;
};
template <class T>
using DeviceType = typename DeviceTypeOf<T>::type;

__device__ __forceinline__ float as_float(float value) { return value; }
__device__ __forceinline__ float as_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float as_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// One element of a weight whose dtype is known at run time only.
__device__ __forceinline__ float load_weight(const void* data, DType dtype, std::int64_t offset) {
  if (dtype == DType::f32) {
    return static_cast<const float*>(data)[offset];
  }
  return dtype == DType::f16 ? as_float(static_cast<const __half*>(data)[offset])
                             : as_float(static_cast<const __nv_bfloat16*>(data)[offset]);
}

__device__ __forceinline__ void store_weight(void* data, DType dtype, std::int64_t offset,
                                             float value) {
  if (dtype == DType::f32) {
    static_cast<float*>(data)[offset] = value;
  } else if (dtype == DType::f16) {
    static_cast<__half*>(data)[offset] = __float2half_rn(value);
  } else {
    static_cast<__nv_bfloat16*>(data)[offset] = __float2bfloat16_rn(value);
  }
}

// COUNT elements as floats. The address must be aligned to the vector that moves (16 bytes at
// most).
template <int COUNT, class T>
__device__ __forceinline__ void load_vector(const T* from, float (&to)[COUNT]) {
  constexpr int kBytes = COUNT * static_cast<int>(sizeof(T));
  static_assert(kBytes == 4 || kBytes == 8 || kBytes % 16 == 0, "no such vector");
  union Bits {
    uint4 vectors[kBytes >= 16 ? kBytes / 16 : 1];
    uint2 pair;
    unsigned word;
    T elements[COUNT];
    __device__ __forceinline__ Bits() {}
  } bits;
  if constexpr (kBytes >= 16) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      bits.vectors[i] = reinterpret_cast<const uint4*>(from)[i];
    }
  } else if constexpr (kBytes == 8) {
    bits.pair = *reinterpret_cast<const uint2*>(from);
  } else {
    bits.word = *reinterpret_cast<const unsigned*>(from);
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    to[i] = as_float(bits.elements[i]);
  }
}

template <int COUNT, class T>
__device__ __forceinline__ void store_vector(T* to, const float (&from)[COUNT]) {
  constexpr int kBytes = COUNT * static_cast<int>(sizeof(T));
  static_assert(kBytes == 4 || kBytes == 8 || kBytes % 16 == 0, "no such vector");
  union Bits {
    uint4 vectors[kBytes >= 16 ? kBytes / 16 : 1];
    uint2 pair;
    unsigned word;
    T elements[COUNT];
    __device__ __forceinline__ Bits() {}
  } bits;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    bits.elements[i] = from_float<T>(from[i]);
  }
  if constexpr (kBytes >= 16) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      reinterpret_cast<uint4*>(to)[i] = bits.vectors[i];
    }
  } else if constexpr (kBytes == 8) {
    *reinterpret_cast<uint2*>(to) = bits.pair;
  } else {
    *reinterpret_cast<unsigned*>(to) = bits.word;
  }
}

// The same for any alignment and for a tail: elements from `valid` on are `fill` (or left
// unwritten). `vectorize` says that address and stride allow vectors; it is uniform over the
// launch.
template <int COUNT, class T>
__device__ __forceinline__ void load_span(const T* from, std::int64_t step, int valid,
                                          bool vectorize, float (&to)[COUNT], float fill = 0.0f) {
  if (vectorize && valid >= COUNT) {
    load_vector<COUNT>(from, to);
    return;
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    to[i] = i < valid ? as_float(from[i * step]) : fill;
  }
}

template <int COUNT, class T>
__device__ __forceinline__ void store_span(T* to, std::int64_t step, int valid, bool vectorize,
                                           const float (&from)[COUNT]) {
  if (vectorize && valid >= COUNT) {
    store_vector<COUNT>(to, from);
    return;
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    if (i < valid) {
      to[i * step] = from_float<T>(from[i]);
    }
  }
}

// Adds four floats to consecutive addresses in global memory: one instruction from Hopper on.
// The address must be 16-byte aligned.
__device__ __forceinline__ void atomic_add4(float* to, float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c),
               "f"(d)
               : "memory");
#else
  atomicAdd(to, a);
  atomicAdd(to + 1, b);
  atomicAdd(to + 2, c);
  atomicAdd(to + 3, d);
#endif
}

// Sum over the warp, in every lane.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

}  // namespace mamba_native::cuda
