// Where silu(z) multiplies: what all implementations branch on.
#pragma once

#include <cstdint>

#include "core/compiler.h"

namespace mamba_native::gated_norm {

enum class Gate : std::int8_t { none, before, after };  // the norm

template <class Params>
MAMBA_ALWAYS_INLINE Gate gate_of(const Params& params) {
  return !params.z.present() ? Gate::none : params.norm_before_gate ? Gate::after : Gate::before;
}

}  // namespace mamba_native::gated_norm
