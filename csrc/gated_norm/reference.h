// The oracle: the gated norm as plain loops, forward and analytic backward, for any dtypes and
// strides. Not public.
//
// Scalar, float or double, is the type of every step, Sum that of long sums. On float64 copies
// reference::...<double> is the truth of the tests, and float64 calls on the CPU run it; <float>,
// all in float32, is their yardstick; <float, double> is what MAMBA_CPU_ISA=plain runs.
#pragma once

#include "gated_norm/gated_norm.h"

namespace mamba_native::gated_norm::reference {

template <class Scalar, class Sum = Scalar>
void forward(const ForwardParams& params);

// Leaves the workspace alone.
template <class Scalar, class Sum = Scalar>
void backward(const BackwardParams& params);

}  // namespace mamba_native::gated_norm::reference
