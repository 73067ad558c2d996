// What calls with an empty tensor need on a CUDA device.
#pragma once

#include "core/tensor.h"

namespace mamba_native::selective_scan::cuda {

// Enqueues to[...] = from[...], or 0 where `from` is absent. Both are float32 of one shape with any
// strides; nothing happens when `to` is absent or empty.
void copy_or_zero(const TensorView& to, const TensorView& from, void* stream);

}  // namespace mamba_native::selective_scan::cuda
