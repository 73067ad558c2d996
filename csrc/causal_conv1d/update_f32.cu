#include "causal_conv1d/update.cuh"

namespace mamba_native::causal_conv1d::cuda {

template void update<float>(const UpdateParams&);

}  // namespace mamba_native::causal_conv1d::cuda
