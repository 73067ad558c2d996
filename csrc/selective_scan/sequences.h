// The sequences that share a batch entry, in the order of the scan. Not public.
#pragma once

#include <cstdint>

#include "core/compiler.h"
#include "core/sequences.h"
#include "selective_scan/selective_scan.h"

namespace mamba_native::selective_scan {

// Always inlined, because the kernels of several instruction sets include it.
MAMBA_ALWAYS_INLINE Sequences sequences_of(const Inputs& in, std::int64_t batch) {
  TensorView index = in.seq_idx;
  if (in.reverse && index.present()) {
    index.mirror(1);
  }
  return Sequences(index, batch, in.u.size[2], in.sequences);
}

}  // namespace mamba_native::selective_scan
