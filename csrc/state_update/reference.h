// The oracle: the step as plain loops, for any dtypes and strides. Not public.
//
// Scalar, float or double, is the type of every step, Sum that of long sums. On float64 copies
// reference::update<double> is the truth of the tests, and float64 calls on the CPU run it;
// <float>, all in float32, is their yardstick; <float, double> is what MAMBA_CPU_ISA=plain runs.
#pragma once

#include "state_update/state_update.h"

namespace mamba_native::state_update::reference {

template <class Scalar, class Sum = Scalar>
void update(const Params& params);

}  // namespace mamba_native::state_update::reference
