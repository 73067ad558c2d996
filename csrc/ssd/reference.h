// The oracle: the scan's mathematics step by step as plain loops, forward and analytic backward.
// Not public.
//
// Scalar is the type of every operation, of the state and of every sum. reference::forward<double>
// on float64 copies is the truth of the tests, and what float64 calls on the CPU run;
// reference::forward<float>, the formula as float32 evaluates it, is the tests' yardstick. Tensors
// may have any floating dtype each; `stream` and the checkpoints that backward gets are unused.
#pragma once

#include "ssd/ssd.h"

namespace mamba_native::ssd::reference {

template <class Scalar>
void forward(const ForwardParams& params);

template <class Scalar>
void backward(const BackwardParams& params);

}  // namespace mamba_native::ssd::reference
