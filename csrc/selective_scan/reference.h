// The oracle: the scan's mathematics as plain loops, forward and analytic backward. Not public.
//
// Scalar is the type of every operation, of the state and of every sum. reference::forward<double>
// on float64 copies is the truth of the tests, and what float64 calls on the CPU run;
// reference::forward<float>, the formula as float32 evaluates it, is the tests' yardstick. Tensors
// may have any floating dtype each; `config`, `stream` and the checkpoints that backward gets are
// unused.
#pragma once

#include "selective_scan/selective_scan.h"

namespace mamba_native::selective_scan::reference {

template <class Scalar>
void forward(const ForwardParams& params);

template <class Scalar>
void backward(const BackwardParams& params);

}  // namespace mamba_native::selective_scan::reference
