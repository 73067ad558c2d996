// The oracle: the norm as plain loops, forward and analytic backward, for any dtypes and strides.
// Not public.
//
// Scalar, float or double, is the type of every elementwise step; sums over features and rows are
// double. On float64 copies reference::...<double> is the truth of the tests, ...<float> their
// yardstick, and float64 calls on the CPU run the former.
#pragma once

#include "layer_norm/layer_norm.h"

namespace mamba_native::layer_norm::reference {

template <class Scalar>
void forward(const ForwardParams& params);

// Leaves the workspace alone.
template <class Scalar>
void backward(const BackwardParams& params);

}  // namespace mamba_native::layer_norm::reference
