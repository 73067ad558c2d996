#include "layer_norm/backward.cuh"

namespace mamba_native::layer_norm::cuda {

template void backward<float>(const BackwardParams&, const BackwardPlan&);

}  // namespace mamba_native::layer_norm::cuda
