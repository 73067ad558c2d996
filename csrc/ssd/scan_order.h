// Time in the order in which the scan visits it. Not public.
#pragma once

#include "ssd/ssd.h"

namespace mamba_native::ssd {

// The same call as a forward-running scan: with `reverse` set, every view that has time begins at
// its last step and has a negative stride, and `reverse` is cleared. Nothing is copied, so what
// takes any stride knows one direction only.
ForwardParams in_scan_order(const ForwardParams& params);
BackwardParams in_scan_order(const BackwardParams& params);

}  // namespace mamba_native::ssd
