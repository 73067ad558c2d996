// Copies of whole tensors on a CUDA device, for what few calls need: empty tensors, sequences
// without steps.
#pragma once

#include "core/tensor.h"

namespace mamba_native::cuda {

// Enqueues to[...] = from[...], or 0 where `from` is absent. Both are float32 of one shape with any
// strides; nothing happens when `to` is absent or empty.
void copy_or_zero(const TensorView& to, const TensorView& from, void* stream);

}  // namespace mamba_native::cuda
