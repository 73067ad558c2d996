// The oracle: the step as plain loops, for any dtypes and strides. Not public.
//
// Scalar, float or double, is the type of every elementwise step; the sum over states is double.
// reference::update<double> on float64 copies is the truth of the tests, reference::update<float>
// their yardstick, and float64 calls on the CPU run the former.
#pragma once

#include "state_update/state_update.h"

namespace mamba_native::state_update::reference {

template <class Scalar>
void update(const Params& params);

}  // namespace mamba_native::state_update::reference
