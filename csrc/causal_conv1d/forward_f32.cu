#include "causal_conv1d/forward.cuh"

namespace mamba_native::causal_conv1d::cuda {

template void forward<float>(const ForwardParams&, const Plan&);

}  // namespace mamba_native::causal_conv1d::cuda
