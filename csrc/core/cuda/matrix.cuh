// Products of small matrices in shared memory, one warp each: on tensor cores where the device has
// them for the type, with FFMA otherwise (float32 everywhere, and so with float32's accuracy;
// bfloat16 on Turing). Both leave the product in the same registers, so kernels know one layout.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/cuda/math.cuh"
#include "core/cuda/memory.cuh"

namespace mamba_native::cuda {

// ---- memory to shared memory, in the background ----

// 16 bytes, both addresses aligned to them.
__device__ __forceinline__ void copy16_async(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#else
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#endif
}

// Ends a group of this thread's copies.
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all copies of this thread but those of its last GROUPS groups.
template <int GROUPS>
__device__ __forceinline__ void wait_for_all_copies_but() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
#endif
}

// Waits for all copies of this thread.
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// ---- where a lane's part of a 16 x 8J product lies ----

// acc[j][0..3] are (row, column), (row, column + 1), (row + 8, column), (row + 8, column + 1) with
// row = fragment_row(lane), column = 8 j + fragment_column(lane).
__device__ __forceinline__ int fragment_row(int lane) { return lane / 4; }
__device__ __forceinline__ int fragment_column(int lane) { return lane % 4 * 2; }

// Two neighbours. The address is aligned to both together.
__device__ __forceinline__ void store_pair(float* to, float a, float b) {
  *reinterpret_cast<float2*>(to) = make_float2(a, b);
}
__device__ __forceinline__ void store_pair(__half* to, float a, float b) {
  *reinterpret_cast<__half2*>(to) = __floats2half2_rn(a, b);
}
__device__ __forceinline__ void store_pair(__nv_bfloat16* to, float a, float b) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(a, b);
}

// ---- products ----

// How an operand of A (m x k) or B (k x n) lies in shared memory: neighbours differ in k, or not.
enum class Order { along_k, across_k };

// What this compilation has tensor cores for.
template <class T>
inline constexpr bool kTensorCores = false;
#if __CUDA_ARCH__ >= 750
template <>
inline constexpr bool kTensorCores<__half> = true;
#endif
#if __CUDA_ARCH__ >= 800
template <>
inline constexpr bool kTensorCores<__nv_bfloat16> = true;
#endif

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
template <bool TRANSPOSE>
__device__ __forceinline__ void load_matrices(const void* row, unsigned (&to)[4]) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (TRANSPOSE) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
  }
}

// acc += A B for one 16 x 16 by 16 x 8 product; b0 and b1 are the rows of B below 8 and from 8 on.
__device__ __forceinline__ void multiply_fragments(float (&acc)[4], const unsigned (&a)[4],
                                                   unsigned b0, unsigned b1, __nv_bfloat16) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
__device__ __forceinline__ void multiply_fragments(float (&acc)[4], const unsigned (&a)[4],
                                                   unsigned b0, unsigned b1, __half) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

template <int J, Order A_ORDER, Order B_ORDER, class T>
__device__ __forceinline__ void multiply_on_tensor_cores(float (&acc)[J][4], const T* a,
                                                         int a_stride, const T* b, int b_stride,
                                                         int depth) {
  static_assert(J % 2 == 0, "a load of four matrices serves two products");
  constexpr bool kRowsOfA = A_ORDER == Order::along_k;
  constexpr bool kRowsOfB = B_ORDER == Order::along_k;
  const int lane = recomputed(static_cast<int>(threadIdx.x)) % 32;
  const int low = lane % 16, high = lane / 16 * 8;  // matrices down, then right
  const int across = lane % 8 + lane / 16 * 8, down = lane / 8 % 2 * 8;  // right, then down
  const T* const a_lane = a + (kRowsOfA ? low * a_stride + high : across * a_stride + down);
  const T* const b_lane = b + (kRowsOfB ? across * b_stride + down : low * b_stride + high);
#pragma unroll 2
  for (int k = 0; k < depth; k += 16) {
    unsigned a_fragment[4];
    load_matrices<!kRowsOfA>(a_lane + (kRowsOfA ? k : k * a_stride), a_fragment);
#pragma unroll
    for (int j = 0; j < J; j += 2) {
      unsigned b_fragments[4];
      load_matrices<!kRowsOfB>(b_lane + (kRowsOfB ? 8 * j * b_stride + k : k * b_stride + 8 * j),
                               b_fragments);
      multiply_fragments(acc[j], a_fragment, b_fragments[0], b_fragments[1], T());
      multiply_fragments(acc[j + 1], a_fragment, b_fragments[2], b_fragments[3], T());
    }
  }
}

template <int J, Order A_ORDER, Order B_ORDER, class T>
__device__ __forceinline__ void multiply_with_fma(float (&acc)[J][4], const T* a, int a_stride,
                                                  const T* b, int b_stride, int depth) {
  constexpr int kDepth = 4;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = fragment_row(lane), column = fragment_column(lane);
#pragma unroll 1
  for (int k = 0; k < depth; k += kDepth) {
    float a_rows[2][kDepth];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (A_ORDER == Order::along_k) {
        load_vector<kDepth>(a + (row + 8 * i) * a_stride + k, a_rows[i]);
      } else {
#pragma unroll
        for (int q = 0; q < kDepth; ++q) {
          a_rows[i][q] = as_float(a[(k + q) * a_stride + row + 8 * i]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < J; ++j) {
      float b_columns[2][kDepth];
      if constexpr (B_ORDER == Order::along_k) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          load_vector<kDepth>(b + (8 * j + column + i) * b_stride + k, b_columns[i]);
        }
      } else {
#pragma unroll
        for (int q = 0; q < kDepth; ++q) {
          float pair[2];
          load_vector<2>(b + (k + q) * b_stride + 8 * j + column, pair);
          b_columns[0][q] = pair[0];
          b_columns[1][q] = pair[1];
        }
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
#pragma unroll
        for (int q = 0; q < kDepth; ++q) {
          acc[j][e] = fmaf(a_rows[e / 2][q], b_columns[e % 2][q], acc[j][e]);
        }
      }
    }
  }
}

// acc (16 x 8J) += A (16 x depth) B (depth x 8J), by the whole warp. depth % 16 == 0. Rows are
// `stride` elements apart, start at multiples of 16 bytes, and should fall on different banks.
template <int J, Order A_ORDER, Order B_ORDER, class T>
__device__ __forceinline__ void multiply(float (&acc)[J][4], const T* a, int a_stride, const T* b,
                                         int b_stride, int depth) {
  if constexpr (kTensorCores<T>) {
    multiply_on_tensor_cores<J, A_ORDER, B_ORDER>(acc, a, a_stride, b, b_stride, depth);
  } else {
    multiply_with_fma<J, A_ORDER, B_ORDER>(acc, a, a_stride, b, b_stride, depth);
  }
}

}  // namespace mamba_native::cuda
