#include "causal_conv1d/update.cuh"

namespace mamba_native::causal_conv1d::cuda {

template void update<Half>(const UpdateParams&);
template void varlen_states<Half>(const VarlenStatesParams&);

}  // namespace mamba_native::causal_conv1d::cuda
