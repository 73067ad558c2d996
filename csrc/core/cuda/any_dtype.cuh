// Access to tensors whose dtype is known at run time only.
//
// Loads return elements as stored; turning them into floats is a step of its own. A conversion
// waits for its load, so a load that converted at once would hold back the loads behind it, and a
// kernel that lives on memory bandwidth needs them all in flight together. Where the dtype argument
// is a constant, its branches fold away.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/dtype.h"

namespace mamba_native::cuda {

template <class T>
inline constexpr DType kDTypeOf = DType::f32;
template <>
inline constexpr DType kDTypeOf<Half> = DType::f16;
template <>
inline constexpr DType kDTypeOf<BFloat16> = DType::bf16;

// One element of an index tensor, int32 or int64.
__device__ __forceinline__ std::int64_t read_index(const void* data, DType dtype,
                                                   std::int64_t offset) {
  return dtype == DType::i64 ? static_cast<const std::int64_t*>(data)[offset]
                             : static_cast<const std::int32_t*>(data)[offset];
}

// One element as stored: 32 bits, or 16 in the lower half.
__device__ __forceinline__ std::uint32_t load_bits(const void* data, DType dtype,
                                                   std::int64_t offset) {
  return dtype == DType::f32 ? static_cast<const std::uint32_t*>(data)[offset]
                             : static_cast<const std::uint16_t*>(data)[offset];
}

__device__ __forceinline__ float bits_to_float(std::uint32_t bits, DType dtype) {
  if (dtype == DType::f32) {
    return __uint_as_float(bits);
  }
  return dtype == DType::bf16
             ? __uint_as_float(bits << 16)
             : __half2float(__ushort_as_half(static_cast<unsigned short>(bits & 0xffffu)));
}

// COUNT neighbours as stored: a word for each float32, or for each two 16-bit elements (then the
// second half of the words is unused).
template <int COUNT>
struct Stored {
  static_assert(COUNT == 4 || COUNT == 8, "16 bytes of a 16-bit or of a 32-bit type");
  std::uint32_t words[COUNT];
};

// Elements offset, offset + step, ... of `data`; those from `valid` on read as 0. `vectorize` says
// that moves_vectors() of core/cuda/alignment.h holds for the tensor, and so that step is 1.
template <int COUNT>
__device__ __forceinline__ Stored<COUNT> load_stored(const void* data, DType dtype,
                                                     std::int64_t offset, std::int64_t step,
                                                     int valid, bool vectorize) {
  Stored<COUNT> to;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    to.words[i] = 0;
  }
  if (dtype == DType::f32) {
    const std::uint32_t* from = static_cast<const std::uint32_t*>(data) + offset;
    if (vectorize && valid >= COUNT) {
#pragma unroll
      for (int i = 0; i < COUNT; i += 4) {
        const uint4 vector = *reinterpret_cast<const uint4*>(from + i);
        to.words[i] = vector.x;
        to.words[i + 1] = vector.y;
        to.words[i + 2] = vector.z;
        to.words[i + 3] = vector.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        if (i < valid) {
          to.words[i] = from[i * step];
        }
      }
    }
    return to;
  }
  const std::uint16_t* from = static_cast<const std::uint16_t*>(data) + offset;
  if (vectorize && valid >= COUNT) {
    if constexpr (COUNT == 8) {
      const uint4 vector = *reinterpret_cast<const uint4*>(from);
      to.words[0] = vector.x;
      to.words[1] = vector.y;
      to.words[2] = vector.z;
      to.words[3] = vector.w;
    } else {
      const uint2 vector = *reinterpret_cast<const uint2*>(from);
      to.words[0] = vector.x;
      to.words[1] = vector.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (i < valid) {
        to.words[i / 2] |= static_cast<std::uint32_t>(from[i * step]) << (i % 2 * 16);
      }
    }
  }
  return to;
}

template <int COUNT>
__device__ __forceinline__ void to_floats(const Stored<COUNT>& from, DType dtype,
                                          float (&to)[COUNT]) {
  if (dtype == DType::f32) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      to[i] = __uint_as_float(from.words[i]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    to[i] = bits_to_float(from.words[i / 2] >> (i % 2 * 16), dtype);
  }
}

// Rounds to nearest even.
template <int COUNT>
__device__ __forceinline__ Stored<COUNT> to_stored(const float (&from)[COUNT], DType dtype) {
  Stored<COUNT> to;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    to.words[i] = 0;
  }
  if (dtype == DType::f32) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      to.words[i] = __float_as_uint(from[i]);
    }
  } else if (dtype == DType::bf16) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 2) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(from[i], from[i + 1]);
      to.words[i / 2] = *reinterpret_cast<const std::uint32_t*>(&pair);
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i += 2) {
      const __half2 pair = __floats2half2_rn(from[i], from[i + 1]);
      to.words[i / 2] = *reinterpret_cast<const std::uint32_t*>(&pair);
    }
  }
  return to;
}

template <int COUNT>
__device__ __forceinline__ void store_stored(void* data, DType dtype, std::int64_t offset,
                                             std::int64_t step, int valid, bool vectorize,
                                             const Stored<COUNT>& from) {
  if (dtype == DType::f32) {
    std::uint32_t* to = static_cast<std::uint32_t*>(data) + offset;
    if (vectorize && valid >= COUNT) {
#pragma unroll
      for (int i = 0; i < COUNT; i += 4) {
        *reinterpret_cast<uint4*>(to + i) =
            make_uint4(from.words[i], from.words[i + 1], from.words[i + 2], from.words[i + 3]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        if (i < valid) {
          to[i * step] = from.words[i];
        }
      }
    }
    return;
  }
  std::uint16_t* to = static_cast<std::uint16_t*>(data) + offset;
  if (vectorize && valid >= COUNT) {
    if constexpr (COUNT == 8) {
      *reinterpret_cast<uint4*>(to) =
          make_uint4(from.words[0], from.words[1], from.words[2], from.words[3]);
    } else {
      *reinterpret_cast<uint2*>(to) = make_uint2(from.words[0], from.words[1]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (i < valid) {
        to[i * step] = static_cast<std::uint16_t>(from.words[i / 2] >> (i % 2 * 16));
      }
    }
  }
}

}  // namespace mamba_native::cuda
