#include "causal_conv1d/forward.cuh"

namespace mamba_native::causal_conv1d::cuda {

template void forward<BFloat16>(const ForwardParams&, const Plan&);

}  // namespace mamba_native::causal_conv1d::cuda
