// Which calls are more than one sum and one output. Not public.
#pragma once

#include "core/compiler.h"
#include "layer_norm/layer_norm.h"

namespace mamba_native::layer_norm {

MAMBA_ALWAYS_INLINE bool has_branches(const ForwardParams& p) {
  return p.x1.present() || p.weight1.present() || p.rowscale.present() || p.dropout.p > 0.0;
}

MAMBA_ALWAYS_INLINE bool has_branches(const BackwardParams& p) {
  return p.dx1.present() || p.weight1.present() || p.rowscale.present() || p.dropout.p > 0.0;
}

}  // namespace mamba_native::layer_norm
