#include "causal_conv1d/update.cuh"

namespace mamba_native::causal_conv1d::cuda {

template void update<float>(const UpdateParams&);
template void varlen_states<float>(const VarlenStatesParams&);

}  // namespace mamba_native::causal_conv1d::cuda
