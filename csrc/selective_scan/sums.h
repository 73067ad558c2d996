// What sums over several CTAs need on a CUDA device. Not public.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace mamba_native::selective_scan::cuda {

// Enqueues sum[...] = 0 in one launch, for sums that atomics will add to. Each is float32 of one or
// two dimensions, or contiguous of any, or absent.
inline constexpr int kCleared = 5;
void clear(const TensorView (&sums)[kCleared], void* stream);

// Enqueues to[...] = sum_b parts[b, ...]. `to`: (D, N) or (D) float32, any strides; nothing happens
// when it is absent. parts: (batch, D, N) or (batch, D), contiguous. For complex numbers, (D, N,
// 2), parts are those of the real ones, then those of the imaginary ones.
void sum_over_batch(const TensorView& to, const float* parts, std::int64_t batch, void* stream);

// Enqueues to[..., t] = sum_k parts[k, ..., t - begin] for the steps of [begin, end). `to`:
// (B, G, N, L) float32, any strides. parts: (blocks, B, G, N, row_steps), contiguous. For complex
// numbers, (B, G, N, L, 2), as above.
void sum_over_blocks(const TensorView& to, const float* parts, std::int64_t blocks,
                     std::int64_t row_steps, std::int64_t begin, std::int64_t end, void* stream);

}  // namespace mamba_native::selective_scan::cuda
