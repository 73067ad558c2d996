// The oracle: the scan's mathematics as plain loops, forward and analytic backward. Not public.
//
// Scalar is the type of every elementwise step and of the state; sums over states, time, batch and
// channels are double. reference::forward<double> on float64 copies is the truth of the tests,
// reference::forward<float> their yardstick, and float64 calls on the CPU run the former. Tensors may
// have any floating dtype each; `config`, `stream` and the checkpoints that backward gets are unused.
#pragma once

#include "selective_scan/selective_scan.h"

namespace mamba_native::selective_scan::reference {

template <class Scalar>
void forward(const ForwardParams& params);

template <class Scalar>
void backward(const BackwardParams& params);

}  // namespace mamba_native::selective_scan::reference
