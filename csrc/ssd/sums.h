// Sums over CTAs on a CUDA device, in a fixed order. Not public.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace mamba_native::ssd::cuda {

// Enqueues to[h] or to[h, p] = sum over rows of parts[row, h, p], and for to[h] over p too. `to`:
// (H) or (H, P) float32, any strides; nothing happens when it is absent. parts: (rows, H, P),
// contiguous; P = `channels`.
void sum_rows(const TensorView& to, const float* parts, std::int64_t rows, std::int64_t channels,
              void* stream);

// Enqueues to[b, t, g, n] = sum over k of parts[k, b, t - begin, g, n] for the steps t of
// [begin, end), for two tensors `to` of one shape, (B, L, G, N) float32, and the same strides.
// parts: (count, B, end - begin, G, N), contiguous.
void sum_parts(const TensorView& first, const TensorView& second, const float* first_parts,
               const float* second_parts, std::int64_t count, std::int64_t begin, std::int64_t end,
               void* stream);

}  // namespace mamba_native::ssd::cuda
