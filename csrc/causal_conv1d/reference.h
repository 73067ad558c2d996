// The oracle: the formulas as plain loops, for any dtypes and strides. Not public; parameters are
// validated and on the CPU.
//
// Scalar, float or double, is the type of every step, Sum that of the sums over batch and time. On
// float64 copies <double> is the truth of the tests, and float64 calls run it; <float>, all in
// float32, is their yardstick; <float, double> is what MAMBA_CPU_ISA=plain runs.
#pragma once

#include "causal_conv1d/causal_conv1d.h"

namespace mamba_native::causal_conv1d::reference {

template <class Scalar>
void forward(const ForwardParams& params);

template <class Scalar, class Sum = Scalar>
void backward(const BackwardParams& params);

template <class Scalar>
void update(const UpdateParams& params);

// A copy, exact in every dtype.
void varlen_states(const VarlenStatesParams& params);

}  // namespace mamba_native::causal_conv1d::reference
