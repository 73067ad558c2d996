#include "layer_norm/forward.cuh"

namespace mamba_native::layer_norm::cuda {

template void forward<Half>(const ForwardParams&, const ForwardPlan&);

}  // namespace mamba_native::layer_norm::cuda
