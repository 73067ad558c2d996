#include "causal_conv1d/backward.cuh"

namespace mamba_native::causal_conv1d::cuda {

template void backward<Half>(const BackwardParams&, const Plan&);

}  // namespace mamba_native::causal_conv1d::cuda
