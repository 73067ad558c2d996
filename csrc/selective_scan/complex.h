// The scan with complex A on a CUDA device. Not public; plan.h has the real one.
#pragma once

#include "selective_scan/selective_scan.h"

namespace mamba_native::selective_scan::cuda {

// Parameters are validated, params.in.is_complex(), and no size is zero. One kernel per direction
// takes every dtype and every call: `config` is unused, and sums always have a fixed order.
void forward_complex(const ForwardParams& params);
void backward_complex(const BackwardParams& params);

}  // namespace mamba_native::selective_scan::cuda
