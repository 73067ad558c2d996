// Time in the order in which the scan visits it. Not public.
#pragma once

#include "selective_scan/selective_scan.h"

namespace mamba_native::selective_scan {

// The same call as a forward-running scan: with `reverse` set, every view that has time begins at
// its last step and has a negative stride, and `reverse` is cleared. Nothing is copied, so kernels
// that take any stride know one direction only.
ForwardParams in_scan_order(const ForwardParams& params);
BackwardParams in_scan_order(const BackwardParams& params);

}  // namespace mamba_native::selective_scan
